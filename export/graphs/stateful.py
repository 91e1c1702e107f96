"""The text graphs for an engine that keeps the KV cache: the buffers that a graph writes become the engine's states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from export.graphs.decoder import PROMPT_CHUNK, Context, ImagePrefill, TextDecoder, filled_text_graphs
from export.graphs.graph import Graph

if TYPE_CHECKING:
    from export.families.family import Checkpoint, Family, Geometry
    from runtime.bundle import TensorInfo


@torch.library.custom_op("pruneport::written", mutates_args=())
def written(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    """cache (1, Hkv, entries, d) with new (1, Hkv, T, d) from entry start (1,) int32 on -> (1, Hkv, entries, d)

    An operator of its own, because in an exported program a slice that begins where a tensor says has no static shape.
    """
    whole, first = cache.clone(), int(start)
    whole[:, :, first : first + new.shape[2]] = new
    return whole


@written.register_fake
def _(cache: Tensor, new: Tensor, start: Tensor) -> Tensor:
    return torch.empty_like(cache)


def cache_buffers(context: Context) -> dict[str, Tensor]:
    """The whole cache by the names of its states, empty; Core ML's states are float16."""
    return {info.name: torch.zeros(info.shape, dtype=torch.float16) for info in context.infos("past_", torch.float16)}


class StatefulImagePrefill(ImagePrefill):
    """Writes the image's whole part of the cache: what `vision_encoder` gave for its layers, and what is computed here.

    hidden (1, P + keep, D) and positions (1, P + keep), then `key_i`, `value_i` (1, Hkv, P + N, d) of the layers
    before the cut -> `key_i` of the last layer, because a graph must have an output.
    """

    origin: Tensor

    def __init__(self, family: Family[Any], geometry: Geometry, context: Context, cache: Mapping[str, Tensor]) -> None:
        super().__init__(family, geometry, context)
        self.register_buffer("origin", torch.zeros(1, dtype=torch.int32), persistent=False)
        for name, buffer in cache.items():
            self.register_buffer(name, buffer, persistent=False)

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each input."""
        seen = self.context.infos("", self.dtype, entries=self.context.seen)
        return (*super().input_infos(), *seen[: 2 * self.first])

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each output."""
        return super().output_infos()[-2:-1]

    def state_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each state."""
        return self.context.infos("past_", self.dtype)

    def forward(self, hidden: Tensor, positions: Tensor, *seen: Tensor) -> tuple[Tensor, ...]:
        computed = super().forward(hidden, positions)
        for info, new in zip(self.state_infos(), (*seen, *computed), strict=True):
            cache = getattr(self, info.name)
            cache.copy_(torch.ops.pruneport.written(cache, new, self.origin))
        return (computed[-2],)


class StatefulTextDecoder(TextDecoder):
    """As `TextDecoder`, over states `past_key_i`, `past_value_i`, into which the new keys and values are written.

    inputs_embeds (1, T, D) float32 and positions (1, T) int64 -> logits (1, T, V) float32. All T entries are written,
    padding too: they must fit, and what padding leaves is overwritten before it is looked at.
    """

    def __init__(
        self, family: Family[Any], geometry: Geometry, context: Context, cache: Mapping[str, Tensor], *, tokens: int
    ) -> None:
        super().__init__(family, geometry, context, tokens=tokens)
        for name, buffer in cache.items():
            self.register_buffer(name, buffer, persistent=False)

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each input."""
        return super().input_infos()[:2]

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each output."""
        return super().output_infos()[:1]

    def state_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each state."""
        return self.context.infos("past_", self.dtype)

    def forward(self, inputs_embeds: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        caches = [getattr(self, info.name) for info in self.state_infos()]
        logits, *computed = super().forward(inputs_embeds, positions, *caches)
        first = positions[0, :1].to(torch.int32)
        for number, (cache, new) in enumerate(zip(caches, computed, strict=True)):
            start = first + (self.context.image_entries(number // 2) - self.context.first_text)
            cache.copy_(torch.ops.pruneport.written(cache, new, start))
        return (logits,)


def build_stateful_text_graphs(
    checkpoint: Checkpoint, context: Context, *, quant: str | None = None, chunk: int = PROMPT_CHUNK
) -> dict[str, Graph]:
    """As `build_text_graphs` in fp16, with the KV cache in buffers that the graphs write, the same ones in each."""
    family, geometry, cache = checkpoint.family, checkpoint.geometry, cache_buffers(context)
    return filled_text_graphs(
        checkpoint,
        StatefulTextDecoder(family, geometry, context, cache, tokens=chunk),
        StatefulTextDecoder(family, geometry, context, cache, tokens=1),
        StatefulImagePrefill(family, geometry, context, cache),
        precision="fp16",
        quant=quant,
    )
