"""The vision subgraph: from pixels to pruned image tokens, before the decoder or inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.blocks.attention import causal_mask
from export.blocks.rope import rope_tables
from export.graphs.graph import Graph
from export.models.prompt import read_prompt
from export.quantize import quantize_layer
from export.weights import at_once, fill
from runtime.errors import ExportError

if TYPE_CHECKING:
    from export.families.family import Checkpoint, Family, Frame, Geometry, ModelEntry, Seen
    from pruning import Arithmetic, PruneSpec
    from runtime.bundle import TensorInfo

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "int64": torch.int64, "int32": torch.int32}
# Buffers that stay float32 in a float16 graph.
_EXACT = ("prefix_hidden", "prefix_positions", "first_position", "numbers")


class VisionEncoder(Graph):
    """pixel_values (1, C, H, W) float32 -> the image as the decoder goes on from it. All shapes are static.

    `cut` is the number of decoder layers that run before the pruner does; the paper (arXiv 2512.02700) takes 2. Tower,
    projector and these layers over the image tokens, then the pruner, on the keys of the last of these layers (after
    the rotary embedding, all key heads side by side) and on its raw output. The prompt in front of the image is always
    the same, and causal attention never looks ahead, so its hidden states, keys and values are constants of the graph.
    Outputs: `hidden` (1, P + keep, D) float32, `positions` (1, P + keep) int64, the numbers of these tokens in the
    unpruned prompt, then `key_i` and `value_i` (1, Hkv, P + T, d) for each layer i below the cut, in the dtype of the
    text graphs' cache, by default the precision that the layers compute in.

    Where tokens end the rows of an image (`Frame.breaks`), the layers below the cut see T = N + rows tokens. The pruner
    chooses among the N, and what it drops it drops with all row ends, so that `keep` tokens go on. With nothing pruned
    all T do.

    At cut 0 no decoder layer has run, so its keys do not exist yet; in their place stand the keys of the tower's last
    layer. The pruner asks keys one thing, which tokens to start from: the largest ones, far from each other. Keys of
    the layer that made the features answer it in the same terms as in the decoder, they are there already, and they are
    4 to 5 times narrower than the projected features. A method that asks for attention gets the class token's in the
    tower's last layer. The paper does not treat this cut; how well it keeps answers is not measured here. Without
    `framed`, the prompt is left to whoever runs the graph, which is possible at cut 0 alone.
    Outputs then: `image_features` (1, keep, D) float32 and `kept_indices` (1, keep) int64.

    Where a tower has features for the first decoder layers, too (`Seen.planes`), these are added to every image token
    behind them, and the cut lies no earlier.

    With a pruner the last output is `filled` (1, 1) float32: how many tokens its fill rule had to choose because the
    fixed number of steps ran out. The golden holds 0, so that parity fails if that ever happens.

    Engines that compute in float16 have no int64: `positions` and `kept_indices` are int32 then, or what `index` says.

    In fp16 the norms scale before they square, GELU and everything in the pruner run in float32, and so do the
    outputs `hidden` and `image_features`.
    """

    # Not the pruner: its choices hang on small differences.
    quantisable = ("tower", "decoder_layers")

    prefix_hidden: Tensor
    prefix_positions: Tensor
    all_positions: Tensor
    first_position: Tensor
    numbers: Tensor
    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(
        self,
        family: Family[Any],
        geometry: Geometry,
        frame: Frame,
        spec: PruneSpec | None,
        *,
        cut: int,
        framed: bool,
        arithmetic: Arithmetic = "float32",
        cache: str | None = None,
        index: str | None = None,
    ) -> None:
        """Builds everything on the meta device; `build_vision_encoder` fills it."""
        super().__init__()
        self.geometry = geometry
        self.frame = frame
        self.cut, self.framed = cut, framed
        self.prefix_length = len(frame.prefix_ids) if framed else 0
        self.image_tokens, self.seen = geometry.image_tokens, len(frame.slots) + len(frame.breaks)
        self.spec = spec
        self._cache = cache
        # Whole numbers as the pruner's engine has them: a phone's NPU has no int64.
        self.index_dtype = DTYPES[index or ("int32" if arithmetic == "float16" else "int64")]
        # Tokens that are handed on of the image.
        self.keep = frame.left(self.image_tokens if spec is None else int(spec.keep))
        self.tower = family.tower(geometry)
        self.decoder_layers = nn.ModuleList(family.layer(geometry) for _ in range(cut))
        self.pruner: nn.Module | None = None
        self.attends = False
        if spec is not None and spec.keep < self.image_tokens:
            from pruning import method_named

            method = method_named(spec.method)
            self.pruner = method.module(spec, arithmetic)
            self.attends = "attention" in method.needs
        everything = torch.arange(self.prefix_length + self.seen, dtype=self.index_dtype)[None]
        self.register_buffer("all_positions", everything, persistent=False)
        first, last = self.prefix_length, self.prefix_length + self.seen
        self.before, self.rows, self.columns = frame.rows
        if self.rows > 1:  # where image tokens stand in the image; else the first one stands first, and so on
            numbers = torch.tensor(frame.slots).float() - float(frame.slots[0])
            self.register_buffer("numbers", numbers[:, None], persistent=False)
        if cut:
            cos, sin = rope_tables(geometry.text, *(axis[first:] for axis in frame.rotary(last)))
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
            self.register_buffer("mask", causal_mask(self.seen, past=first), persistent=False)
        if framed:
            # As float32, exact far beyond any context: delegates have no integer arithmetic.
            self.register_buffer("prefix_positions", torch.arange(first).float()[None], persistent=False)
            self.register_buffer("first_position", torch.tensor([float(first)]), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the tower computes in."""
        return next(self.tower.parameters()).dtype

    @property
    def layers_dtype(self) -> torch.dtype:
        """The precision that the decoder layers compute in; the tower's where there are none."""
        return self.cos.dtype if self.cut else self.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """The precision that keys and values are handed on in."""
        return self.layers_dtype if self._cache is None else DTYPES[self._cache]

    @property
    def index_name(self) -> str:
        """The dtype of positions and indices, by its name in a manifest."""
        return str(self.index_dtype).removeprefix("torch.")

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each input."""
        from runtime.bundle import TensorInfo

        return (TensorInfo(name="pixel_values", shape=self.geometry.pixel_values, dtype="float32"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each output."""
        from runtime.bundle import TensorInfo

        text = self.geometry.text
        filled = () if self.pruner is None else (TensorInfo(name="filled", shape=(1, 1), dtype="float32"),)
        if not self.framed:
            return (
                TensorInfo(name="image_features", shape=(1, self.keep, text.hidden), dtype="float32"),
                TensorInfo(name="kept_indices", shape=(1, self.keep), dtype=self.index_name),
                *filled,
            )
        kept, seen = self.prefix_length + self.keep, self.prefix_length + self.seen
        cache = (1, text.kv_heads, seen, text.head_dim)
        dtype = str(self.cache_dtype).removeprefix("torch.")
        return (
            TensorInfo(name="hidden", shape=(1, kept, text.hidden), dtype="float32"),
            TensorInfo(name="positions", shape=(1, kept), dtype=self.index_name),
            *(
                TensorInfo(name=f"{part}_{index}", shape=cache, dtype=dtype)
                for index in range(self.cut)
                for part in ("key", "value")
            ),
            *filled,
        )

    def half_precision(self, *, layers: bool = True) -> VisionEncoder:
        """Makes everything but the pruner, its inputs and the constant prefix states float16, in place.

        Without `layers` the decoder layers and what they compute with stay as they are.
        """
        self.tower.half()
        if not layers:
            return self
        self.decoder_layers.half()
        for name, buffer in list(self.named_buffers(recurse=False)):
            if buffer.is_floating_point() and name not in _EXACT:
                setattr(self, name, buffer.half())
        return self

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """pixel_values float32, (1, C, H, W) or several views, -> the outputs that `output_infos` lists."""
        pixel_values = pixel_values.to(self.dtype)
        seen = self.tower(pixel_values, attention=True) if self.attends else self.tower(pixel_values)
        return self.from_seen(seen)

    def from_seen(self, seen: Seen) -> tuple[Tensor, ...]:
        """What the tower saw -> outputs; its keys and attention count at cut 0 alone."""
        hidden, keys, attention, planes = seen
        if not self.framed:
            if self.pruner is None:
                return hidden.float(), self.all_positions
            tokens, indices, filled = self._pruned(self.pruner, keys, self._without_breaks(hidden), attention)
            return tokens, self._numbered(indices).to(self.index_dtype), filled
        caches: list[Tensor] = []
        hidden = hidden.to(self.layers_dtype)
        for index, layer in enumerate(self.decoder_layers):
            past_key, past_value = getattr(self, f"prefix_key_{index}"), getattr(self, f"prefix_value_{index}")
            hidden, key, _, all_keys, all_values = layer(hidden, self.cos, self.sin, self.mask, past_key, past_value)
            if index < len(planes):
                hidden = hidden + planes[index].to(self.layers_dtype)
            keys = key.permute(1, 0, 2).reshape(1, self.seen, -1)
            attention = None  # it was the tower's
            caches += [part.reshape(1, *part.shape).to(self.cache_dtype) for part in (all_keys, all_values)]
        if self.pruner is None:
            return torch.cat([self.prefix_hidden, hidden.float()], dim=1), self.all_positions, *caches
        if self.cut:
            keys = self._without_breaks(keys)
        tokens, indices, filled = self._pruned(self.pruner, keys, self._without_breaks(hidden), attention)
        positions = torch.cat([self.prefix_positions, self._numbered(indices) + self.first_position], dim=1)
        return torch.cat([self.prefix_hidden, tokens], dim=1), positions.to(self.index_dtype), *caches, filled

    def _without_breaks(self, x: Tensor) -> Tensor:
        """What the image is without the ends of its rows: (1, T, W) -> (1, N, W)"""
        if not self.rows:
            return x
        rows = x[:, self.before :].reshape(self.rows, self.columns + 1, x.shape[2])[:, : self.columns]
        rows = rows.reshape(1, self.rows * self.columns, x.shape[2])
        return torch.cat([x[:, : self.before], rows], dim=1) if self.before else rows

    def _numbered(self, indices: Tensor) -> Tensor:
        """Indices (1, keep) of image tokens -> their numbers in the image, the ends of its rows counted."""
        if self.rows <= 1:
            return indices
        return nn.functional.embedding(indices.long(), self.numbers).reshape(1, -1)

    @staticmethod
    def _pruned(
        pruner: nn.Module, keys: Tensor, hidden: Tensor, attention: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(1, N, Dk), (1, N, D), (1, N) -> tokens (1, keep, D), indices (1, keep) whole numbers, filled (1, 1)"""
        from pruning import Features

        looked_at = None if attention is None else attention.float()
        tokens, indices, filled = pruner(Features(hidden=hidden.float(), keys=keys.float(), attention=looked_at))
        # Those of many tokens come as int32, because engines that compute in float16 would round them.
        return tokens, indices if indices.dtype == torch.int32 else indices.float(), filled


def build_vision_encoder(
    checkpoint: Checkpoint,
    entry: ModelEntry,
    spec: PruneSpec | None,
    *,
    cut: int = 2,
    framed: bool = True,
    precision: str = "fp32",
    quant_layers: str | None = None,
    arithmetic: Arithmetic = "float32",
    cache: str | None = None,
    index: str | None = None,
    prefix_ids: Sequence[int] | None = None,
) -> VisionEncoder:
    """The vision subgraph of `entry` with the weights of `checkpoint`, ready to be traced (eval, no gradients).

    `arithmetic` is what the engine computes the pruner in, `cache` the dtype that keys and values are handed on in, as
    the text graphs take them: `float32` or `float16`, by default what the decoder layers compute in. `index` is the
    dtype of positions, `int64` or `int32`, by default as the engine has them.
    `prefix_ids` is the prompt in front of the image, by default the checkpoint's chat template.

    `spec` None or with `keep` equal to the number of image tokens gives the unpruned twin. `cut` is the first decoder
    layer that sees fewer tokens. With `quant_layers` (see export.quantize) the decoder
    layers are quantised, exactly as the text graphs that share them, and compute in float32 around that. Weights are
    read, cast and placed one at a time, so that fp16 never holds the whole in float32.

    Raises ExportError for a cut, precision or grid that does not fit, CheckpointError for bad weights.
    """
    geometry = checkpoint.geometry
    if prefix_ids is None:
        prefix_ids = read_prompt(checkpoint.folder, geometry, entry).prefix_ids
    frame = entry.family.frame(prefix_ids, geometry)
    _check_request(geometry, frame, entry, spec, cut, framed, precision)
    dtype = PRECISIONS[precision]
    with torch.no_grad():
        encoder = VisionEncoder(
            entry.family,
            geometry,
            frame,
            spec,
            cut=cut,
            framed=framed,
            arithmetic=arithmetic,
            cache=cache,
            index=index,
        )
        fill(encoder.tower, checkpoint, "tower", dtype)
        encoder.tower.to(dtype)
        if framed:
            _fill_decoder(encoder, checkpoint, frame, dtype, quant_layers)
        if dtype == torch.float16:
            encoder.half_precision(layers=quant_layers is None)
    return encoder.eval().requires_grad_(False)


def _check_request(
    geometry: Geometry,
    frame: Frame,
    entry: ModelEntry,
    spec: PruneSpec | None,
    cut: int,
    framed: bool,
    precision: str,
) -> None:
    if precision not in PRECISIONS:
        raise ExportError(f"precision {precision!r} is not known; allowed: {', '.join(PRECISIONS)}")
    if not geometry.least_cut <= cut < geometry.text.layers:
        raise ExportError(
            f"cut={cut} must lie in {geometry.least_cut}..{geometry.text.layers - 1}: pruning happens in front of one "
            f"of the {geometry.text.layers} decoder layers of {entry.name}, behind those that every image token enters"
        )
    if cut and not framed:
        raise ExportError(f"cut={cut} needs the prompt in front of the image inside the graph; cut 0 alone does not")
    if spec is not None and (tuple(spec.grid), spec.overview) != (geometry.grid, geometry.overview):
        raise ExportError(
            f"the pruner's grid {tuple(spec.grid)} is not the grid {geometry.grid} of {entry.name}'s image tokens"
        )
    image = list(range(len(frame.prefix_ids), len(frame.ids)))
    one_image = sorted((*frame.slots, *frame.breaks)) == image and len(frame.slots) == geometry.image_tokens
    if not one_image or not frame.prefix_ids:
        raise ExportError(
            f"the prompt of {entry.name} is no prefix with one image behind it; the graphs know no other frame yet: "
            "choose another model"
        )


def _fill_decoder(
    encoder: VisionEncoder, checkpoint: Checkpoint, frame: Frame, dtype: torch.dtype, quant: str | None
) -> None:
    """Fills the decoder layers and runs the prefix through each while it is there in float32."""
    length = len(frame.prefix_ids)
    hidden = checkpoint.rows("embed_tokens.weight", frame.prefix_ids).float()[None]
    cos, sin = rope_tables(encoder.geometry.text, *frame.rotary(length))
    mask = causal_mask(length)
    for index, layer in enumerate(encoder.decoder_layers):
        fill(layer, at_once(checkpoint), f"layers.{index}", torch.float32)
        out = layer(hidden, cos, sin, mask)
        hidden = out.hidden
        encoder.register_buffer(f"prefix_key_{index}", out.key.contiguous(), persistent=False)
        encoder.register_buffer(f"prefix_value_{index}", out.value.contiguous(), persistent=False)
        stored = dtype if quant is None else torch.float32
        if at_once(checkpoint) is checkpoint:
            layer.to(stored)
        else:
            fill(layer, checkpoint, f"layers.{index}", stored)  # the numbers have had their use
        if quant is not None:
            quantize_layer(layer, quant, below_cut=True)
    encoder.register_buffer("prefix_hidden", hidden, persistent=False)
