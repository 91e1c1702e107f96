"""The desktop model, asked many questions about a photo at once: what precedes the pruner runs once for all methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from export.evaluation.questions import Line
from export.families.desktop import LayerCache
from export.models.prompt import end_ids, read_prompt
from pruning import Features
from runtime.errors import ExportError
from runtime.prompt import TOKENIZER_FILE, Tokenizer

if TYPE_CHECKING:
    from export.families.family import Checkpoint, ModelEntry

_CLOSED = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Reading:
    """A photo with all questions about it, in front of each decoder layer that may be pruned at.

    Attributes:
        features: what a method may look at, by cut; behind the projector attention is the class token's, in the
            decoder that of the first question's last token.
        image: (1, P + T, D) prefix and image, the ends of its rows among it, in front of the layer, by cut.
        text: (1, T, D) questions and answers, one behind the other, in front of the layer, by cut.
        places: (1, T) absolute positions of the text.
        block: (T,) the question a token belongs to.
        goals: (T,) the token that must follow, or -100 where the question is still being asked.
    """

    features: dict[int, Features]
    image: dict[int, Tensor]
    text: dict[int, Tensor]
    places: Tensor
    block: Tensor
    goals: Tensor


class EagerModel:
    """transformers' own modules of one checkpoint, all in memory, in float32."""

    def __init__(self, checkpoint: Checkpoint, entry: ModelEntry) -> None:
        """Reads all weights. Raises ExportError for one without a tokenizer, CheckpointError for a bad one."""
        geometry = checkpoint.geometry
        prompt = read_prompt(checkpoint.folder, geometry, entry)
        if checkpoint.folder is None or prompt.template is None:
            raise ExportError(
                "these weights have no tokenizer and no chat template, so nothing can be asked; give others"
            )
        self._desktop = entry.family.desktop(checkpoint, "cpu")
        self._frame = entry.family.frame(prompt.prefix_ids, geometry)
        self._tokenizer = Tokenizer(checkpoint.folder / TOKENIZER_FILE, prompt)
        self._ends = end_ids(checkpoint)
        self._embeddings = checkpoint.tensor("embed_tokens.weight").float()
        self._layers = [self._desktop.layer(index) for index in range(geometry.text.layers)]
        self._norm = self._desktop.norm()
        self._head = checkpoint.tensor("lm_head.weight").float()
        self._slots = torch.tensor(self._frame.slots)
        self.grid, self.overview = geometry.grid, geometry.overview

    @torch.no_grad()
    def read(self, photo: np.ndarray, lines: Sequence[Line], cuts: Sequence[int]) -> Reading:
        """Sees a photo (H, W, 3) uint8 and reads all questions about it, up to the deepest of `cuts`."""
        seen = self._desktop.see(torch.from_numpy(np.array(self._desktop.pixels(photo))))
        ids, block, places, goals = self._packed(lines)
        prefix = len(self._frame.prefix_ids)
        image = torch.cat([self._embeddings[list(self._frame.prefix_ids)][None], seen.features], 1)
        text = self._embeddings[ids][None]
        positions = torch.tensor(self._frame.positions)
        keys, attention = seen.keys, seen.attention
        asked = len(self._tokenizer.question_ids(lines[0].question))
        question = text[:, :asked]
        reading = Reading({}, {}, {}, places, block, goals)
        for index in range(max(cuts) + 1):
            if index in cuts:
                reading.features[index] = Features(image[:, self._slots], keys, attention, question)
                reading.image[index], reading.text[index] = image, text
            if index == max(cuts):
                break
            image, text, key, looks = self._run(index, image, positions, text, places, block)
            if index < len(seen.planes):
                image = torch.cat([image[:, :prefix], image[:, prefix:] + seen.planes[index]], 1)
            keys = key[0][:, self._slots].transpose(0, 1).flatten(1)[None]
            attention = looks[:, :, image.shape[1] + asked - 1].mean(1)[:, self._slots]
        return reading

    @torch.no_grad()
    def right(self, reading: Reading, cut: int, kept: tuple[Tensor, Tensor] | None) -> list[bool]:
        """Whether greedy decoding gives each answer to its end.

        `kept` are image tokens (1, K, D) and their indices (1, K); None keeps the whole image.
        """
        prefix = len(self._frame.prefix_ids)
        image, positions = reading.image[cut], torch.tensor(self._frame.positions)
        if kept is not None:
            tokens, indices = kept
            image = torch.cat([image[:, :prefix], tokens], 1)
            positions = torch.cat([positions[:, :prefix], positions[:, self._slots[indices[0]]]], 1)
        text = reading.text[cut]
        for index in range(cut, len(self._layers)):
            image, text, _, _ = self._run(index, image, positions, text, reading.places, reading.block)
        said = reading.goals >= 0
        likely = torch.nn.functional.linear(self._norm(text[0, said]), self._head).argmax(-1)
        wrong = torch.zeros(int(reading.block.max()) + 1)
        wrong.index_add_(0, reading.block[said], (likely != reading.goals[said]).float())
        return [count == 0 for count in wrong.tolist()]

    def _packed(self, lines: Sequence[Line]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ids: list[int] = []
        block: list[int] = []
        places: list[int] = []
        goals: list[int] = []
        for number, line in enumerate(lines):
            asked = self._tokenizer.question_ids(line.question)
            said = [*self._tokenizer.answer_ids(line.answer), self._ends[0]]
            tokens = [*asked, *said][:-1]
            ids += tokens
            block += [number] * len(tokens)
            places += range(self._frame.first_text, self._frame.first_text + len(tokens))
            goals += [-100] * (len(asked) - 1) + said
        return torch.tensor(ids), torch.tensor(block), torch.tensor(places)[None], torch.tensor(goals)

    def _run(
        self, index: int, image: Tensor, positions: Tensor, text: Tensor, places: Tensor, block: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One layer over image and texts: causal, and no text sees another.

        Returns both, and the layer's keys (1, Hkv, T, d) and attention (1, H, T, T).
        """
        seen, tokens = image.shape[1], text.shape[1]
        hidden = torch.cat([image, text], 1)
        at = torch.arange(seen + tokens)
        member = torch.cat([torch.full((seen,), -1), block])
        open_ = (at[:, None] >= at) & ((member == -1) | (member[:, None] == member))
        mask = torch.where(open_, 0.0, _CLOSED)[None, None]
        where = torch.cat([positions, places.expand(len(positions), -1)], 1)
        if len(where) == 3:
            where = where[:, None]
        cache = LayerCache(None)
        layer: nn.Module = self._layers[index]
        looks: list[Tensor] = []
        watch = layer.get_submodule("self_attn").register_forward_hook(
            lambda _module, _inputs, out: looks.append(out[1])
        )
        try:
            out: Tensor = layer(
                hidden,
                attention_mask=mask,
                position_ids=where,
                past_key_values=cache,
                position_embeddings=self._desktop.rotary(hidden, where),
            )
        finally:
            watch.remove()
        assert cache.entries is not None
        return out[:, :seen], out[:, seen:], cache.entries[0], looks[0]
