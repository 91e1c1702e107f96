"""The language half as ready-made runners call it: any number of tokens at a time, with the KV cache inside."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from export.blocks.norms import RmsNorm
from export.blocks.rope import rope_tables
from export.graphs.graph import Graph
from export.graphs.open_decoder import OpenTokenEmbedding
from export.graphs.vision import PRECISIONS
from export.quantize import quantize
from export.weights import fill
from runtime.errors import ExportError

if TYPE_CHECKING:
    from export.blocks.decoder_layer import DecoderLayer
    from export.families.family import Checkpoint, Family, Geometry
    from runtime.bundle import TensorInfo


class CachedLayer(nn.Module):
    """A decoder layer with a KV cache of its own.

    Update and attention are ExecuTorch's own operators, which work in place and look at filled entries only. Plain
    operators would have to look at every entry behind a mask: 2.4 times the time of a token, measured with a layer of
    the 7B model in 8da4w and 130 of 2048 entries filled.
    """

    key_cache: Tensor
    value_cache: Tensor
    swap: Tensor

    def __init__(self, layer: DecoderLayer, *, entries: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = layer.self_attn.head_dim
        for name in ("key_cache", "value_cache"):
            empty = torch.zeros(1, entries, layer.self_attn.kv_heads, self.head_dim)
            self.register_buffer(name, empty, persistent=False)
        # Exchanges the halves of a head. A product, because the delegate cuts no tensor whose length is open.
        half = torch.eye(self.head_dim).roll(self.head_dim // 2, dims=1)
        self.register_buffer("swap", half, persistent=False)

    def append(self, hidden: Tensor, cos: Tensor, sin: Tensor, start: int) -> Tensor:
        """hidden (1, T, D) of the tokens from entry `start` on, tables (1, T, 1, d) -> (1, T, D)"""
        attention = self.layer.self_attn
        normed = self.layer.input_layernorm(hidden)
        query = self.rotate(self.heads(attention.queries(normed)), cos, sin)
        key = self.rotate(self.heads(attention.keys(normed)), cos, sin)
        torch.ops.llama.update_cache(key, self.key_cache, start)
        torch.ops.llama.update_cache(self.heads(attention.v_proj(normed)), self.value_cache, start)
        mixed = torch.ops.llama.custom_sdpa(query, self.key_cache, self.value_cache, start, None, 0.0, True)
        hidden = hidden + attention.o_proj(mixed.reshape(1, -1, attention.heads * self.head_dim))
        out: Tensor = hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))
        return out

    def heads(self, x: Tensor) -> Tensor:
        """(1, T, H * d) -> (1, T, H, d)"""
        return x.reshape(1, -1, x.shape[2] // self.head_dim, self.head_dim)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The rotary embedding with tables of `rope_tables`: (1, T, H, d) -> (1, T, H, d)"""
        return x * cos + nn.functional.linear(x, self.swap) * sin


class CachedTextDecoder(Graph):
    """1..`tokens` tokens through all layers, behind `input_pos` tokens that were decoded before.

    inputs_embeds (1, T, D) float32, input_pos (1,) int64 -> logits (1, 1, V) float32 of the last token. Positions are
    counted as the runner counts what it has passed in: prompt prefix, kept image tokens and text are contiguous.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, family: Family[Any], geometry: Geometry, *, tokens: int, context: int) -> None:
        super().__init__()
        text = geometry.text
        self.tokens, self.context = tokens, context
        self.width, self.vocab = text.hidden, text.vocab
        self.layers = nn.ModuleList(CachedLayer(family.layer(geometry), entries=context) for _ in range(text.layers))
        self.norm = RmsNorm(text.hidden, text.norm_eps)
        self.lm_head = nn.Linear(text.hidden, text.vocab, bias=False, device="meta")
        cos, sin = rope_tables(text, range(context))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, largest shape and dtype of each input."""
        from runtime.bundle import TensorInfo

        return (
            TensorInfo(name="inputs_embeds", shape=(1, self.tokens, self.width), dtype="float32", dynamic=(1,)),
            TensorInfo(name="input_pos", shape=(1,), dtype="int64"),
        )

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each output."""
        from runtime.bundle import TensorInfo

        return (TensorInfo(name="logits", shape=(1, 1, self.vocab), dtype="float32"),)

    def open_axes(self) -> Mapping[str, Mapping[int, str]]:
        """Names of the open axes, by input."""
        return {"inputs_embeds": {1: "tokens"}}

    def forward(self, inputs_embeds: Tensor, input_pos: Tensor) -> Tensor:
        tokens = inputs_embeds.shape[1]
        start = cast(int, input_pos.item())
        positions = torch.arange(tokens) + input_pos
        cos, sin = (
            nn.functional.embedding(positions, table).reshape(1, -1, 1, table.shape[1])
            for table in (self.cos, self.sin)
        )
        hidden = inputs_embeds.to(self.cos.dtype)
        for layer in self.layers:
            assert isinstance(layer, CachedLayer)
            hidden = layer.append(hidden, cos, sin, start)
        logits: Tensor = self.lm_head(self.norm(hidden[:, -1:]))
        return logits.float()


class ReadyMadeGraphs(NamedTuple):
    """The language half; both take any number of tokens up to `text_decoder.tokens`."""

    token_embedding: OpenTokenEmbedding
    text_decoder: CachedTextDecoder


def build_ready_made_graphs(
    checkpoint: Checkpoint, *, tokens: int, context: int, precision: str = "fp32", quant: str | None = None
) -> ReadyMadeGraphs:
    """The language half for at most `tokens` tokens at a time and `context` of them in all.

    Each layer is quantised (see export.quantize) as soon as it is filled. Ready to be traced.

    Raises ExportError for sizes that do not fit each other or the checkpoint.
    """
    longest = checkpoint.geometry.text.max_positions
    if not 1 <= tokens <= context <= longest:
        raise ExportError(
            f"tokens={tokens} and context={context} must satisfy 1 <= tokens <= context <= {longest}, the positions "
            "that the checkpoint knows; give fewer --text-tokens"
        )
    _register_operators()
    dtype = PRECISIONS[precision]
    decoder = CachedTextDecoder(checkpoint.family, checkpoint.geometry, tokens=tokens, context=context)
    for index, layer in enumerate(decoder.layers):
        assert isinstance(layer, CachedLayer)
        fill(layer.layer, checkpoint, f"layers.{index}", dtype)
        if quant is not None:
            quantize(layer, quant)
    fill(decoder.norm, checkpoint, "norm", dtype)
    fill(decoder.lm_head, checkpoint, "lm_head", dtype)
    if quant is not None:
        quantize(decoder, quant)  # what is left of it: the output matrix
    if dtype == torch.float16:
        decoder.half()
    embedding = OpenTokenEmbedding(checkpoint.geometry, tokens=tokens)
    fill(embedding.embed_tokens, checkpoint, "embed_tokens", dtype)
    return ReadyMadeGraphs(embedding.eval().requires_grad_(False), decoder.eval().requires_grad_(False))


def _register_operators() -> None:
    """Makes torch.ops.llama known, for eager mode and for tracing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library announces on import that it is experimental
        from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401 - the import registers
