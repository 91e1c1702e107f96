"""The text decoder that ready-made ONNX runtimes expect: one graph for prompt and answer, its KV cache in and out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.blocks.attention import HIDDEN
from export.blocks.norms import RmsNorm
from export.blocks.rope import rope_tables
from export.graphs.vision import PRECISIONS
from export.quantize import quantize
from export.weights import fill

if TYPE_CHECKING:
    from export.families.family import Checkpoint, Family, Geometry


class MergedDecoder(nn.Module):
    """T tokens through all layers behind S cached ones; T and S are free, and S is 0 at the start of a prompt.

    inputs_embeds (1, T, D) float32, attention_mask (1, S + T) int64, position_ids (1, T) int64, then
    `past_key_values.i.key`, `past_key_values.i.value` (1, Hkv, S, d) for every layer i -> logits (1, T, V) float32,
    then `present.i.key`, `present.i.value` (1, Hkv, S + T, d), to be handed back as the next past. Keys and values are
    in the precision that the layers compute in.

    A token sees the entries before it and itself, where the attention mask is 1. Positions are the caller's and must
    lie below the checkpoint's `max_position_embeddings`; an engine's look-up fails on others.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, family: Family[Any], geometry: Geometry) -> None:
        """Builds everything on the meta device; `build_merged_decoder` fills it."""
        super().__init__()
        text = geometry.text
        self.text = text
        self.layers = nn.ModuleList(family.layer(geometry) for _ in range(text.layers))
        self.norm = RmsNorm(text.hidden, text.norm_eps)
        self.lm_head = nn.Linear(text.hidden, text.vocab, bias=False, device="meta")
        cos, sin = rope_tables(text, range(text.max_positions))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the layers compute in."""
        return self.cos.dtype

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return "inputs_embeds", "attention_mask", "position_ids", *self._cache_names("past_key_values")

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return "logits", *self._cache_names("present")

    def _cache_names(self, prefix: str) -> tuple[str, ...]:
        return tuple(f"{prefix}.{index}.{part}" for index in range(self.text.layers) for part in ("key", "value"))

    def example_inputs(self, *, tokens: int = 3, past: int = 2) -> tuple[Tensor, ...]:
        """Inputs of the right shapes from a fixed seed, with nothing masked."""
        generator = torch.Generator().manual_seed(0)
        cache = (1, self.text.kv_heads, past, self.text.head_dim)
        return (
            torch.randn(1, tokens, self.text.hidden, generator=generator),
            torch.ones(1, past + tokens, dtype=torch.int64),
            torch.arange(past, past + tokens)[None],
            *(torch.randn(cache, generator=generator).to(self.dtype) for _ in range(2 * self.text.layers)),
        )

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        at = position_ids[0]
        cos, sin = nn.functional.embedding(at, self.cos), nn.functional.embedding(at, self.sin)
        entry = torch.arange(attention_mask.shape[1])
        own = entry[past[0].shape[2] :]
        closed = (entry[None] > own[:, None]) | (attention_mask == 0)
        mask = closed.to(self.dtype) * HIDDEN
        hidden = inputs_embeds.to(self.dtype)
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            out = layer(hidden, cos, sin, mask, past[2 * index][0], past[2 * index + 1][0])
            hidden = out.hidden
            present += [out.all_keys.unsqueeze(0), out.all_values.unsqueeze(0)]
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits.float(), *present


def build_merged_decoder(checkpoint: Checkpoint, *, precision: str = "fp32", quant: str | None = None) -> MergedDecoder:
    """The decoder with the weights of `checkpoint`, ready to be traced (eval, no gradients).

    With `quant` (see export.quantize) each layer is quantised as soon as it is filled, and computes in fp32 around it.
    """
    graph = MergedDecoder(checkpoint.family, checkpoint.geometry)
    dtype = torch.float32 if quant is not None else PRECISIONS[precision]
    for index, layer in enumerate(graph.layers):
        fill(layer, checkpoint, f"layers.{index}", dtype)
        if quant is not None:
            quantize(layer, quant)
    fill(graph.norm, checkpoint, "norm", dtype)
    fill(graph.lm_head, checkpoint, "lm_head", dtype)
    if quant is not None:
        quantize(graph, quant)  # what is left of it: the output matrix
    return graph.to(dtype).eval().requires_grad_(False)
