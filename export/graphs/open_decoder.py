"""The language half for engines that take any number of tokens: each decoder layer once, for the image and for text.

`decoder_front` holds the layers before the cut, `decoder_back` those from there on, `lm_head` the norm and the output
matrix. All but the batch are open axes: tokens from 1 to what the graph says, and as many entries of the KV cache as
the caller hands over, so that a question pays for its own tokens and attention for what is filled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.blocks.attention import HIDDEN
from export.blocks.byte_embedding import ByteEmbedding, GatheredByteEmbedding
from export.blocks.decoder_layer import DecoderLayer
from export.blocks.norms import RmsNorm
from export.blocks.rope import rope_tables
from export.graphs.decoder import Context, TokenEmbedding, precise_modules
from export.graphs.graph import Graph
from export.graphs.vision import PRECISIONS
from export.quantize import SCHEMES, check_widths, quantize, quantize_layer
from export.ranges import make_islands
from export.weights import at_once, fill
from runtime.text_graphs import DECODER_BACK, DECODER_FRONT, LM_HEAD, TOKEN_EMBEDDING

if TYPE_CHECKING:
    from export.families.family import Checkpoint, Family, Geometry
    from runtime.bundle import TensorInfo


class OpenLayer(nn.Module):
    """A decoder layer behind a cache, with nothing sliced: XNNPACK slices what has a fixed size alone.

    Halves are swapped by a product with ones and zeros, exactly; scores of cache and new tokens are put side by side,
    and so are their values. Queries that share a key lie one behind the other, those of a token together.
    """

    swap: Tensor

    def __init__(self, layer: DecoderLayer) -> None:
        super().__init__()
        self.layer = layer
        width = layer.self_attn.head_dim
        self.register_buffer("swap", torch.eye(width).roll(width // 2, dims=0), persistent=False)

    def forward(
        self, hidden: Tensor, cos: Tensor, sin: Tensor, masks: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden (1, T, D), tables (T, 1, d), masks (1, S) and (T * g, T), g queries to a key, past (1, Hkv, S, d) each
        -> hidden (1, T, D), key and value (1, Hkv, T, d) of the new tokens"""
        attention = self.layer.self_attn
        heads, shared, width = attention.heads, attention.kv_heads, attention.head_dim
        normed = self.layer.input_layernorm(hidden)
        query = self._rotated(attention.queries(normed) * attention.scale, heads // shared, cos, sin)
        key = self._rotated(attention.keys(normed), 1, cos, sin)
        value = attention.v_proj(normed).view(-1, shared, width).permute(1, 0, 2)
        known_keys, known_values = (entries.view(shared, -1, width) for entries in past)
        beyond, ahead = masks
        known_scores = torch.bmm(query, known_keys.permute(0, 2, 1)) + beyond
        scores = torch.cat([known_scores, torch.bmm(query, key.permute(0, 2, 1)) + ahead], dim=2)
        mixed = torch.bmm(torch.softmax(scores, dim=-1), torch.cat([known_values, value], dim=1))
        mixed = mixed.view(shared, -1, heads // shared * width).permute(1, 0, 2).contiguous()
        hidden = hidden + attention.o_proj(mixed.view(1, -1, heads * width))
        out: Tensor = hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))
        return out, key.view(1, shared, -1, width), value.view(1, shared, -1, width)

    def _rotated(self, x: Tensor, group: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads with the rotary embedding of tables from `rope_tables`: (1, T, Hkv * g * d) -> (Hkv, T * g, d)"""
        width = self.swap.shape[0]
        heads = x.view(-1, x.shape[2] // (group * width), group, width).permute(1, 0, 2, 3)
        rotated = heads * cos + nn.functional.linear(heads, self.swap) * sin
        return rotated.contiguous().view(rotated.shape[0], -1, width)


class OpenDecoder(Graph):
    """Some decoder layers over 1..`tokens` new tokens, behind what the caller's cache holds.

    hidden (1, T, D) float32, positions (1, T) int64, filled (1,) int64, then `past_key_i` and `past_value_i`
    (1, Hkv, S, d) of every layer i here -> hidden (1, T, D) float32, then `key_i`, `value_i` (1, Hkv, T, d): the new
    tokens' own, for the caller to put into the cache. Of its S entries, at least one, only the first `filled` count;
    the rest is never looked at. New tokens see the filled ones, those before them and themselves.
    """

    cos: Tensor
    sin: Tensor
    entry: Tensor

    def __init__(
        self,
        family: Family[Any],
        geometry: Geometry,
        context: Context,
        layers: range,
        *,
        tokens: int,
        takes: str,
        gives: str,
    ) -> None:
        super().__init__()
        self.context, self.tokens, self.width = context, tokens, geometry.text.hidden
        self.takes, self.gives = takes, gives
        self.group = geometry.text.heads // geometry.text.kv_heads
        # Named by their places in the model, as the weights are.
        self.layers = nn.ModuleDict({str(index): OpenLayer(family.layer(geometry)) for index in layers})
        self.entries = context.entries(layers[0])
        cos, sin = rope_tables(geometry.text, *context.rotary)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # 1 at the first entry of a cache, 2 at the next ...: what exceeds the number of filled ones is masked.
        most = max(self.entries, tokens)
        self.register_buffer("entry", torch.arange(1, most + 1).float()[None], persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the layers compute in."""
        return self.cos.dtype

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, largest shape and dtype of each input."""
        from runtime.bundle import TensorInfo

        return (
            TensorInfo(name=self.takes, shape=(1, self.tokens, self.width), dtype="float32", dynamic=(1,)),
            TensorInfo(name="positions", shape=(1, self.tokens), dtype=self.context.index, dynamic=(1,)),
            TensorInfo(name="filled", shape=(1,), dtype="int64"),
            *self._cache("past_", self.entries),
        )

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, largest shape and dtype of each output."""
        from runtime.bundle import TensorInfo

        return (
            TensorInfo(name=self.gives, shape=(1, self.tokens, self.width), dtype="float32", dynamic=(1,)),
            *self._cache("", self.tokens),
        )

    def _cache(self, what: str, entries: int) -> tuple[TensorInfo, ...]:
        layers = [int(index) for index in self.layers]
        infos = self.context.infos(what, self.dtype, first=layers[0], last=layers[-1], entries=entries)
        return tuple(info.with_open(2) for info in infos)

    def open_axes(self) -> Mapping[str, Mapping[int, str]]:
        """Names of the open axes, by input: those of one name have one length."""
        past = {info.name: {2: "entries"} for info in self.input_infos() if info.name.startswith("past_")}
        return {self.takes: {1: "tokens"}, "positions": {1: "tokens"}, **past}

    def forward(self, hidden: Tensor, positions: Tensor, filled: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        at = positions.view(-1, 1)
        cos, sin = nn.functional.embedding(at, self.cos), nn.functional.embedding(at, self.sin)
        beyond = self._after(self.entry[:, : past[0].shape[2]], filled.view(1, 1).float())
        order = self.entry[:, : hidden.shape[1]]
        ahead = self._after(order, order.view(-1, 1).expand(-1, self.group).reshape(-1, 1))
        hidden = hidden.to(self.dtype)
        caches: list[Tensor] = []
        for number, layer in enumerate(self.layers.values()):
            entries = past[2 * number], past[2 * number + 1]
            hidden, key, value = layer(hidden, cos, sin, (beyond, ahead), entries)
            caches += [key, value]
        return hidden.float(), *caches

    def _after(self, place: Tensor, last: Tensor) -> Tensor:
        """0 where a place is at most the last one that may be seen, far below 0 behind it; whole numbers both."""
        return ((place - last).clamp(0.0, 1.0) * HIDDEN).to(self.dtype)


class LmHead(Graph):
    """last_hidden (1, T, D) float32 -> logits (1, T, V) float32, for 1..`tokens` tokens."""

    def __init__(self, geometry: Geometry, *, tokens: int) -> None:
        super().__init__()
        self.tokens, self.width, self.vocab = tokens, geometry.text.hidden, geometry.text.vocab
        self.norm = RmsNorm(geometry.text.hidden, geometry.text.norm_eps)
        self.lm_head = nn.Linear(geometry.text.hidden, geometry.text.vocab, bias=False, device="meta")
        self.dtype = torch.float32

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, largest shape and dtype of the input."""
        from runtime.bundle import TensorInfo

        return (TensorInfo(name="last_hidden", shape=(1, self.tokens, self.width), dtype="float32", dynamic=(1,)),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, largest shape and dtype of the output."""
        from runtime.bundle import TensorInfo

        return (TensorInfo(name="logits", shape=(1, self.tokens, self.vocab), dtype="float32", dynamic=(1,)),)

    def open_axes(self) -> Mapping[str, Mapping[int, str]]:
        """Names of the open axes, by input."""
        return {"last_hidden": {1: "tokens"}}

    def forward(self, last_hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.norm(last_hidden.to(self.dtype)))
        return logits.float()


class OpenTokenEmbedding(TokenEmbedding):
    """ids (1, T) int64 -> inputs_embeds (1, T, D) float32, T from 1 to `tokens`."""

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, largest shape and dtype of the input."""
        return tuple(info.with_open(1) for info in super().input_infos())

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, largest shape and dtype of the output."""
        return tuple(info.with_open(1) for info in super().output_infos())

    def open_axes(self) -> Mapping[str, Mapping[int, str]]:
        """Names of the open axes, by input."""
        return {"ids": {1: "tokens"}}


def open_text_parts(
    checkpoint: Checkpoint,
    context: Context,
    *,
    precision: str = "fp32",
    embedding_precision: str = "fp32",
    embedding_in_bytes: bool = False,
    quant: str | None = None,
    chunk: int,
    precise: Iterable[str] = (),
) -> list[tuple[tuple[str, ...], Callable[[], Mapping[str, Graph]]]]:
    """Parts, for `export.graphs.graph.Parts`, of the open graphs for texts of up to `chunk` tokens at a time.

    Each is built and filled when it is come to. With `quant` (see export.quantize) each layer is quantised as soon as
    it is filled, and computes in fp32 around that; `embedding_in_bytes` stores the rows of the token embedding in 8
    bits (see export.blocks.byte_embedding); `precise` names modules, such as `layers.3.mlp`, that compute in float32
    all the same.
    """
    family, geometry = checkpoint.family, checkpoint.geometry
    dtype = torch.float32 if quant is not None else PRECISIONS[precision]
    islands = tuple(precise)

    def with_islands(graph: Graph, paths: Mapping[str, str]) -> Graph:
        """`paths` are those of the islands in the graph, by their names in the model."""
        if paths:
            modules = precise_modules(checkpoint, paths)
            make_islands(graph, {path: modules[name] for name, path in paths.items()})
        return graph.eval().requires_grad_(False)

    def decoder(name: str) -> Graph:
        front = name == DECODER_FRONT
        layers = range(context.cut) if front else range(context.cut, geometry.text.layers)
        graph = OpenDecoder(
            family,
            geometry,
            context,
            layers,
            tokens=chunk if front else max(chunk, context.prefix + context.keep),
            takes="inputs_embeds" if front else "hidden",
            gives="hidden" if front else "last_hidden",
        )
        for index, held in graph.layers.items():
            assert isinstance(held, OpenLayer)
            fill(held.layer, checkpoint, f"layers.{index}", dtype)
            if quant is not None:
                quantize_layer(held.layer, quant, below_cut=front)
        if dtype == torch.float16:
            graph.half()
            graph.entry = graph.entry.float()  # compared with counts, which float16 does not hold exactly
        paths = {}
        for island in islands:
            _, index, inside = [*island.split(".", 2), "", ""][:3]
            if index in graph.layers:
                paths[island] = f"layers.{index}.layer.{inside}"
        return with_islands(graph, paths)

    def head() -> Graph:
        graph = LmHead(geometry, tokens=chunk)
        graph.dtype = dtype
        fill(graph.norm, checkpoint, "norm", dtype)
        fill(graph.lm_head, checkpoint, "lm_head", dtype)
        if quant is not None:
            quantize(graph, quant)
        return with_islands(
            graph.half() if dtype == torch.float16 else graph, {name: name for name in islands if name == "norm"}
        )

    def embedding() -> Graph:
        graph = OpenTokenEmbedding(geometry, tokens=chunk)
        gathered = quant is not None and SCHEMES[quant].form == "nbits"
        # A table that is rounded here has to be there; others may wait until they are written.
        source = at_once(checkpoint) if embedding_in_bytes and not gathered else checkpoint
        fill(graph.embed_tokens, source, "embed_tokens", PRECISIONS[embedding_precision])
        if embedding_in_bytes:
            table = graph.embed_tokens.get_parameter("weight")
            if gathered:
                check_widths("int8", {"embed_tokens": geometry.text.hidden})
            graph.embed_tokens = GatheredByteEmbedding(table) if gathered else ByteEmbedding(table)
        return with_islands(graph, {})

    def part(name: str, build: Callable[[], Graph]) -> tuple[tuple[str, ...], Callable[[], Mapping[str, Graph]]]:
        return (name,), lambda: {name: build()}

    fronts = [part(DECODER_FRONT, lambda: decoder(DECODER_FRONT))] if context.cut else []
    return [
        *fronts,
        part(DECODER_BACK, lambda: decoder(DECODER_BACK)),
        part(LM_HEAD, head),
        part(TOKEN_EMBEDDING, embedding),
    ]
