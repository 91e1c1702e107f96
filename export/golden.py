"""Golden outputs of every graph, made on the desktop by transformers' own modules and the paper's loop.

Nothing here touches export.graphs: what the exported graph is compared with must not share its mistakes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.families.desktop import LayerCache
from export.models.prompt import read_prompt
from runtime.errors import ExportError, RequestError
from runtime.golden import (
    ANSWER,
    ANSWER_MARGIN,
    KEPT_ALTERNATIVES,
    KEPT_INDICES,
    KEPT_MARGIN,
    KEPT_ORDER,
    MARKS,
    PIXELS,
    QUESTION,
    input_key,
    output_key,
    recovery_key,
)
from runtime.text_graphs import IMAGE_PREFILL, TEXT_DECODER, TEXT_PREFILL, TOKEN_EMBEDDING, VISION_ENCODER

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from export.families.family import Checkpoint, Desktop, Frame, ModelEntry, Seen
    from export.models.prompt import SampleText
    from pruning import Features, Method, PruneSpec

# Where desktop outputs can be made, as a request spells it.
REFERENCES = ("auto", "cpu", "cuda")
# Greedy tokens of the sample answer.
ANSWER_TOKENS = 64
# How often features are moved by how much, relative, to find the choices that float32 cannot tell from the desktop's.
_DRAWS, _MOVED_BY = 6, 1e-6


def golden_device(reference: str = "auto") -> str:
    """The desktop device that `reference` asks for: "cuda" or "cpu"; "auto" is a GPU if one can be used.

    RequestError for "cuda" without such a GPU. There is no precision to choose: the bounds of a check are distances
    from float32, so an output in 16 bits defines nothing that a bundle could be held against.
    """
    if reference == "cpu":
        return "cpu"
    fault = _gpu_fault()
    if fault is None:
        return "cuda"
    if reference == "cuda":
        raise RequestError(
            f"reference=cuda needs a GPU that torch can compute on: {fault}; allowed: {', '.join(REFERENCES)}; take "
            "--reference cpu, whose outputs serve as well, or run this on a machine with a GPU and a torch made for it"
        )
    return "cpu"


def device_words(device: str) -> str:
    """The device as the manifest names it: "cpu", or CUDA with the GPU's own name and what its products are made of."""
    import torch

    return "cpu" if device == "cpu" else f"cuda ({torch.cuda.get_device_name(device)}; TF32 off)"


def _gpu_fault() -> str | None:
    """Why torch cannot compute on a GPU here; None where it can."""
    import torch

    if not torch.cuda.is_available():
        made_for = torch.version.cuda
        if made_for is None:
            return f"torch {torch.__version__} is built without CUDA"
        return f"torch {torch.__version__}, built for CUDA {made_for}, finds no GPU with a driver for it"
    try:
        torch.ones(8, 8, device="cuda").mm(torch.ones(8, 8, device="cuda")).cpu()
    except RuntimeError as error:  # a GPU that this build has no kernels for, or that others have filled
        return f"{torch.cuda.get_device_name()} refuses a product of 8 x 8 ({str(error).strip().splitlines()[0]})"
    return None


def make_golden(
    checkpoint: Checkpoint,
    entry: ModelEntry,
    spec: PruneSpec | None,
    *,
    cut: int = 2,
    framed: bool = True,
    pixel_values: NDArray[np.float32],
    text: SampleText | None = None,
    device: str = "cpu",
    watch: Callable[[str, nn.Module], None] | None = None,
) -> dict[str, NDArray[Any]]:
    """Inputs and outputs of the graphs in float32, by the names the bundle stores them under.

    `vision_encoder.in.pixel_values` (1, C, H, W), `vision_encoder.out.<name>` for each output, and with a spec that
    prunes `kept_indices` (keep,) ascending, `kept_order` (keep,) in the order of selection, `kept_margin` (keep,) how
    near each choice was to going the other way, `kept_alternatives` (A, keep) what is kept where choices too near for
    float32 go the other way, `marks` (M,) that the method's picture should show, and where it mixes dropped tokens into
    kept ones what that is computed from: `recovery.hidden` (N, D) that enters the cut, `recovery.similarity` (N, N),
    `recovery.share` (1,), `recovery.least_share` (1,). With `text`, where the vision graph is `framed` the same for the
    text graphs, and where the decoder fits into memory `answer.question`, `answer.ids` (64,) greedily, and
    `answer.margin` (64,), by how much each token's logit led. Inputs that are another graph's outputs are not repeated.
    Modules are filled and dropped one layer at a time, so that memory holds one layer and not the model, but for the
    answer. `watch` is shown each decoder layer and the last norm before they run, by their names in the text graphs.
    ExportError for an image that does not fit.
    """
    import torch

    geometry = checkpoint.geometry
    if pixel_values.shape != geometry.pixel_values:
        raise ExportError(f"pixel_values must have shape {geometry.pixel_values}, got {pixel_values.shape}")
    if cut < geometry.least_cut:
        raise ExportError(
            f"cut={cut}: the first {geometry.least_cut} decoder layers of {entry.name} need every image token; give "
            f"{geometry.least_cut} or more"
        )
    with torch.no_grad(), _exact_float32():
        pixels = torch.from_numpy(np.array(pixel_values, dtype=np.float32)).to(device)
        desktop = entry.family.desktop(checkpoint, device)
        seen = desktop.see(pixels)
        image = seen.features
        golden = {input_key(VISION_ENCODER, PIXELS): pixels}
        decoder = _Decoder(desktop, checkpoint, cut, image.device, watch or (lambda name, module: None))
        frame = entry.family.frame(read_prompt(checkpoint.folder, geometry, entry).prefix_ids, geometry)
        if framed:
            outputs, kept = decoder.see(frame, seen, spec)
            if text is not None:
                golden |= decoder.read(outputs, text)
        else:
            outputs, kept = _unframed(seen, spec, frame)
            if text is not None:
                golden |= decoder.answer_behind(frame, outputs["image_features"], text)
    if kept:
        outputs["filled"] = torch.zeros(1, 1)  # the paper's loop runs until it has enough: nothing to fill up
    golden |= {output_key(VISION_ENCODER, name): tensor for name, tensor in outputs.items()}
    golden |= kept
    return {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in golden.items()}


@contextmanager
def _exact_float32() -> Iterator[None]:
    """On CUDA, real float32 products instead of TF32, whose 10-bit mantissa would reorder the selection."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _unframed(seen: Seen, spec: PruneSpec | None, frame: Frame) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tokens, numbers, kept = _pruned(seen, spec, frame)
    return {"image_features": tokens, "kept_indices": numbers}, kept


class _Decoder:
    """transformers' decoder layers: once over prefix and image, then over texts behind what that left in the cache."""

    def __init__(
        self,
        desktop: Desktop,
        checkpoint: Checkpoint,
        cut: int,
        device: torch.device,
        watch: Callable[[str, nn.Module], None],
    ) -> None:
        self._desktop, self._checkpoint, self._cut, self._device = desktop, checkpoint, cut, device
        self._watch = watch
        self._layers = range(checkpoint.geometry.text.layers)
        self._held: dict[int, nn.Module] = {}
        self._holds_all = False
        self._last: tuple[nn.Module, Tensor] | None = None
        self._past: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values (1, Hkv, entries, d) of each layer
        self._frame: Frame | None = None

    def see(self, frame: Frame, seen: Seen, spec: PruneSpec | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Runs prefix and image together through the layers before the cut, as transformers does, then prunes.

        At cut 0 the tower's keys stand in for those of a layer.
        """
        import torch

        image = seen.features
        hidden = torch.cat([self._embedded(frame.prefix_ids), image], dim=1)
        first, self._frame = len(frame.prefix_ids), frame
        positions = torch.arange(len(frame.ids), device=self._device)[None]
        outputs = {}
        for index in range(self._cut):
            hidden = self._run(index, hidden, positions)
            outputs[f"key_{index}"], outputs[f"value_{index}"] = self._past[index]
            if index < len(seen.planes):
                hidden = torch.cat([hidden[:, :first], hidden[:, first:] + seen.planes[index]], dim=1)
        enters = seen._replace(features=hidden[:, first:])
        if self._cut:
            keys = self._past[self._cut - 1][0][0][:, list(frame.slots)].transpose(0, 1).flatten(1)[None]
            enters = enters._replace(keys=keys, attention=None)
        tokens, numbers, kept = _pruned(enters, spec, frame)
        states = {
            "hidden": torch.cat([hidden[:, :first], tokens], dim=1),
            "positions": torch.cat([positions[:, :first], numbers + first], dim=1),
        }
        return states | outputs, kept

    def read(self, image: Mapping[str, Tensor], text: SampleText) -> dict[str, Tensor]:
        """Golden tensors of the text graphs, after `see` gave `image`: each layer over the image, then the text."""
        import torch

        golden = {input_key(TOKEN_EMBEDDING, "ids"): torch.tensor([text.ids[:-1]])}
        embedded = self._embedded(text.ids)
        golden[output_key(TOKEN_EMBEDDING, "inputs_embeds")] = embedded[:, :-1]
        golden[input_key(TEXT_DECODER, "inputs_embeds")] = embedded[:, -1:]
        first_text = self._first_text
        positions = torch.arange(first_text, first_text + len(text.ids), device=self._device)[None]
        golden[input_key(TEXT_PREFILL, "positions")] = positions[:, :-1]
        golden[input_key(TEXT_DECODER, "positions")] = positions[:, -1:]
        self._holds_all = self._fits()
        seen, hidden = image["hidden"], embedded
        for index in self._layers:
            if index == self._cut and self._cut:
                golden[output_key(TEXT_PREFILL, "hidden")] = hidden[:, :-1]
                golden[output_key(TEXT_DECODER, "hidden")] = hidden[:, -1:]
            if index >= self._cut:
                seen = self._run(index, seen, image["positions"])
                for what, entries in zip(("key", "value"), self._past[index], strict=True):
                    golden[output_key(IMAGE_PREFILL, f"{what}_{index}")] = entries
            before = self._past[index]
            hidden = self._run(index, hidden, positions, behind=before)
            for what, all_entries, known in zip(("key", "value"), self._past[index], before, strict=True):
                new = all_entries[:, :, known.shape[2] :]
                golden[output_key(TEXT_PREFILL, f"{what}_{index}")] = new[:, :, :-1]
                golden[output_key(TEXT_DECODER, f"{what}_{index}")] = new[:, :, -1:]
            self._past[index] = before
        golden[output_key(IMAGE_PREFILL, "last_hidden")] = seen
        golden[output_key(TEXT_PREFILL, "last_hidden")] = hidden[:, :-1]
        golden[output_key(TEXT_DECODER, "last_hidden")] = hidden[:, -1:]
        logits = self._logits(hidden)
        golden[output_key(TEXT_PREFILL, "logits")] = logits[:, :-1]
        golden[output_key(TEXT_DECODER, "logits")] = logits[:, -1:]
        return golden | (self._answer(text.question) if self._holds_all else {})

    def answer_behind(self, frame: Frame, image: Tensor, text: SampleText) -> dict[str, Tensor]:
        """The answer to the question behind image features (1, keep, D), at contiguous positions."""
        import torch

        if not self._fits():
            return {}
        self._holds_all = True
        hidden = torch.cat([self._embedded(frame.prefix_ids), image], dim=1)
        self._frame = type(frame).of_one_image(frame.prefix_ids, frame.ids[frame.slots[0]], (1, image.shape[1]))
        positions = torch.arange(self._first_text, device=self._device)[None]
        for index in self._layers:
            hidden = self._run(index, hidden, positions)
        return self._answer(text.question)

    def _answer(self, question: Sequence[int]) -> dict[str, Tensor]:
        import torch

        ids: list[int] = []
        margins: list[float] = []
        start, tokens = self._first_text, list(question)
        while len(ids) < ANSWER_TOKENS:
            hidden = self._embedded(tokens)
            positions = torch.arange(start, start + len(tokens), device=self._device)[None]
            for index in self._layers:
                hidden = self._run(index, hidden, positions, behind=self._past[index])
            (first, second), (token, _) = (x.tolist() for x in self._logits(hidden[:, -1:])[0, 0].topk(2))
            ids.append(token)
            margins.append(first - second)
            start, tokens = start + len(tokens), [token]
        return {
            QUESTION: torch.tensor(list(question)),
            ANSWER: torch.tensor(ids),
            ANSWER_MARGIN: torch.tensor(margins),
        }

    @property
    def _first_text(self) -> int:
        """The number of the first token behind the frame in the unpruned prompt."""
        assert self._frame is not None
        return len(self._frame.ids)

    def _turned_by(self, numbers: Tensor) -> Tensor:
        """Rotary positions of numbers (1, T) in the unpruned prompt: (1, T), or (A, 1, T) where there are A axes."""
        import torch

        assert self._frame is not None
        axes = torch.tensor(self._frame.rotary(int(numbers.max()) + 1), device=self._device)
        return axes[:, numbers[0]] if len(axes) == 1 else axes[:, numbers]

    def _fits(self) -> bool:
        """Whether all layers may stay in memory together: in the machine's beside the graph that is lowered afterwards,
        in a GPU's beside one more layer and the output matrix.
        """
        import torch

        from export.memory import fits_beside

        names = [name for name in self._checkpoint.names() if name.startswith("layers.")]
        size = sum(4 * math.prod(self._checkpoint.shape(name)) for name in names)
        if self._device.type == "cuda":
            return size < 0.7 * torch.cuda.mem_get_info(self._device)[0]
        return fits_beside(size)

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        """(1, T, D)"""
        return self._checkpoint.rows("embed_tokens.weight", ids).float().to(self._device)[None]

    def _logits(self, hidden: Tensor) -> Tensor:
        """(1, T, D) -> (1, T, V)"""
        import torch

        norm, head = self._last or (
            self._desktop.norm(),
            self._checkpoint.tensor("lm_head.weight").float().to(self._device),
        )
        if self._holds_all:  # as the layers are
            self._last = norm, head
        self._watch("norm", norm)
        normed = norm(hidden)
        return torch.nn.functional.linear(normed, head)

    def _run(
        self, index: int, hidden: Tensor, positions: Tensor, *, behind: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """hidden (1, T, D) through one layer, causally and behind a cache; its new cache is left in `_past`.

        `positions` (1, T) number the tokens in the unpruned prompt.
        """
        import torch

        tokens, past = hidden.shape[1], 0 if behind is None else behind[0].shape[2]
        ahead = torch.full((tokens, tokens), torch.finfo(torch.float32).min, device=self._device).triu(1)
        mask = torch.cat([torch.zeros(tokens, past, device=self._device), ahead], dim=1)[None, None]
        cache = LayerCache(behind)
        out: Tensor = self._layer(index)(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            position_embeddings=self._desktop.rotary(hidden, self._turned_by(positions)),
        )
        assert cache.entries is not None
        self._past[index] = cache.entries
        return out

    def _layer(self, index: int) -> nn.Module:
        if index not in self._held:
            if not self._holds_all:
                self._held.clear()  # before the next one is read; the image and the text take the same in turns
            self._held[index] = self._desktop.layer(index)
            self._watch(f"layers.{index}", self._held[index])
        return self._held[index]


def _pruned(enters: Seen, spec: PruneSpec | None, frame: Frame) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """tokens (1, keep, D), their numbers in the image (1, keep), and the trace of the selection without its batch."""
    import torch

    hidden, keys, attention, _ = enters
    if spec is None or spec.keep == len(frame.slots):
        return hidden, torch.arange(hidden.shape[1], device=hidden.device)[None], {}
    numbers = torch.tensor(frame.slots, device=hidden.device) - len(frame.prefix_ids)
    hidden = hidden[:, numbers]  # row ends are no candidates
    from pruning import Features, method_named

    # The loop is a definition, not a kernel: it runs on the CPU, on features from whatever device made them.
    method = method_named(spec.method)
    features = Features(hidden=hidden.cpu(), keys=keys.cpu(), attention=None if attention is None else attention.cpu())
    trace = method.choose(features, spec)
    kept = {
        KEPT_INDICES: trace.indices[0],
        KEPT_ORDER: trace.order[0],
        KEPT_MARGIN: trace.margin[0],
        KEPT_ALTERNATIVES: _alternatives(method, features, spec, trace.indices[0]),
        MARKS: trace.marks[0],
    }
    if trace.recovery is not None:
        kept |= {
            recovery_key("hidden"): hidden[0],
            recovery_key("similarity"): trace.recovery.similarity[0],
            recovery_key("share"): torch.tensor([trace.recovery.share]),
            recovery_key("least_share"): torch.tensor([trace.recovery.least_share]),
        }
    return trace.tokens.to(hidden.device), numbers[trace.indices.to(hidden.device)], kept


def _alternatives(method: Method, features: Features, spec: PruneSpec, kept: Tensor) -> Tensor:
    """Other kept tokens (A, keep) that come out when the features are moved in their last bits; mostly A is 0."""
    import torch

    draw = torch.Generator().manual_seed(0)
    found: dict[tuple[int, ...], Tensor] = {}
    for _ in range(_DRAWS):
        moved = {
            name: x.double() * (1.0 + _MOVED_BY * torch.randn(x.shape, generator=draw))
            for name, x in features._asdict().items()
            if x is not None
        }
        indices = method.choose(features._replace(**moved), spec).indices[0]
        if not torch.equal(indices, kept):
            found[tuple(indices.tolist())] = indices
    return torch.stack([*found.values()]) if found else kept.new_zeros(0, len(kept))
