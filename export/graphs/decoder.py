"""The language half: token embedding, the rest of the image's prefill, and the text decoder over a ragged KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from export.blocks.attention import HIDDEN, Part, causal_mask
from export.blocks.decoder_layer import DecoderLayer
from export.blocks.norms import RmsNorm
from export.blocks.rope import rope_tables
from export.graphs.graph import Graph
from export.graphs.vision import PRECISIONS
from export.quantize import quantize, quantize_layer
from export.weights import fill
from runtime.text_graphs import IMAGE_PREFILL, TEXT_DECODER, TEXT_PREFILL, TOKEN_EMBEDDING

if TYPE_CHECKING:
    from export.families.family import Checkpoint, Family, Frame, Geometry
    from runtime.bundle import TensorInfo

PROMPT_CHUNK = 128
# What `build_text_graphs` makes, in its order.
TEXT_GRAPHS = (IMAGE_PREFILL, TEXT_PREFILL, TEXT_DECODER, TOKEN_EMBEDDING)


class Context:
    """How many entries the KV cache of each layer has behind a frame, and which positions they stand for.

    The image part of a layer holds the prompt prefix and the image tokens that the layer saw: all of them below
    `cut`, the kept ones from there on. The text part follows it and has room for `text` tokens in every layer. Text
    goes on where it would behind the unpruned image, whatever was dropped, as in the paper's code. Positions number the
    tokens of the unpruned prompt; what the rotary embedding makes of each is `rotary`. `index` is the dtype in which
    `vision_encoder` hands on positions.
    """

    def __init__(
        self, geometry: Geometry, frame: Frame, *, keep: int, cut: int, text: int, index: str = "int64"
    ) -> None:
        self.layers = geometry.text.layers
        self.kv_heads, self.head_dim = geometry.text.kv_heads, geometry.text.head_dim
        self.cut = cut
        self.prefix = len(frame.prefix_ids)
        self.seen = len(frame.ids)
        self.keep = keep
        self.text = text
        self.first_text = len(frame.ids)
        self.index = index
        self._frame = frame

    @property
    def positions(self) -> int:
        """Absolute positions that can occur."""
        return self.first_text + self.text

    @property
    def rotary(self) -> tuple[tuple[int, ...], ...]:
        """What the rotary embedding takes each position for, a row for each of its axes."""
        return self._frame.rotary(self.positions)

    def image_entries(self, index: int) -> int:
        """Entries of layer `index` that the prefix and the image take."""
        return self.seen if index < self.cut else self.prefix + self.keep

    def entries(self, index: int) -> int:
        """All entries of layer `index`."""
        return self.image_entries(index) + self.text

    def infos(
        self,
        what: str,
        dtype: torch.dtype,
        *,
        first: int = 0,
        last: int | None = None,
        entries: int | None = None,
    ) -> tuple[TensorInfo, ...]:
        """`key` and `value` of layers `first` to `last`, (1, Hkv, entries, d); all entries of a layer by default."""
        from runtime.bundle import TensorInfo

        return tuple(
            TensorInfo(
                name=f"{what}{part}_{index}",
                shape=(1, self.kv_heads, self.entries(index) if entries is None else entries, self.head_dim),
                dtype="float16" if dtype == torch.float16 else "float32",
            )
            for index in range(first, self.layers if last is None else last + 1)
            for part in ("key", "value")
        )


class TokenEmbedding(Graph):
    """ids (1, T) int64 -> inputs_embeds (1, T, D) float32"""

    def __init__(self, geometry: Geometry, *, tokens: int) -> None:
        super().__init__()
        self.tokens, self.width = tokens, geometry.text.hidden
        self.embed_tokens: nn.Module = nn.Embedding(geometry.text.vocab, geometry.text.hidden, device="meta")

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each input."""
        from runtime.bundle import TensorInfo

        return (TensorInfo(name="ids", shape=(1, self.tokens), dtype="int64"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each output."""
        from runtime.bundle import TensorInfo

        return (TensorInfo(name="inputs_embeds", shape=(1, self.tokens, self.width), dtype="float32"),)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.embed_tokens(ids)
        return out.float()


class _Decoder(Graph):
    """What both graphs over decoder layers share: the layers, and rotary tables for every position that can occur."""

    cos: Tensor
    sin: Tensor

    def __init__(self, family: Family[Any], geometry: Geometry, context: Context, *, first: int) -> None:
        super().__init__()
        self.context = context
        self.first = first
        self.width = geometry.text.hidden
        self.layers = nn.ModuleList(family.layer(geometry) for _ in range(first, geometry.text.layers))
        cos, sin = rope_tables(geometry.text, *context.rotary)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the layers compute in."""
        return self.cos.dtype

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, d) of positions (1, T)."""
        at = positions.view(-1)
        return nn.functional.embedding(at, self.cos), nn.functional.embedding(at, self.sin)


class ImagePrefill(_Decoder):
    """What is left to do for the image once it is pruned: the keys and values of the layers from the cut on.

    hidden (1, P + keep, D) float32 and positions (1, P + keep), as `vision_encoder` hands them on ->
    `key_i`, `value_i` (1, Hkv, P + keep, d) for the layers i that `vision_encoder` has not run. Nothing here depends on
    the question. Of the last layer only keys and values are computed, because nothing follows it.
    """

    mask: Tensor

    def __init__(self, family: Family[Any], geometry: Geometry, context: Context) -> None:
        super().__init__(family, geometry, context, first=context.cut)
        self.tokens = context.prefix + context.keep
        self.register_buffer("mask", causal_mask(self.tokens), persistent=False)

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each input."""
        from runtime.bundle import TensorInfo

        return (
            TensorInfo(name="hidden", shape=(1, self.tokens, self.width), dtype="float32"),
            TensorInfo(name="positions", shape=(1, self.tokens), dtype=self.context.index),
        )

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each output."""
        return self.context.infos("", self.dtype, first=self.first, entries=self.tokens)

    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        cos, sin = self.rotary(positions)
        hidden = hidden.to(self.dtype)
        caches: list[Tensor] = []
        *before, last = self.layers
        for layer in before:
            out = layer(hidden, cos, sin, self.mask)
            hidden = out.hidden
            caches += [out.key.unsqueeze(0), out.value.unsqueeze(0)]
        assert isinstance(last, DecoderLayer)
        key, value = last.key_value(hidden, cos, sin)
        return *caches, key.unsqueeze(0), value.unsqueeze(0)


class TextDecoder(_Decoder):
    """`tokens` text tokens through all layers, over a cache of the image and of the text before them.

    inputs_embeds (1, T, D) float32, positions (1, T) int64, then `past_key_i`, `past_value_i` (1, Hkv, entries, d) for
    every layer i -> logits (1, T, V) float32, then `key_i`, `value_i` (1, Hkv, T, d): the new tokens' own, for the
    caller to put into the cache. How much of the cache's text part is filled follows from the first position; what lies
    beyond is never looked at. With fewer than T tokens to decode the rest is padding, whose outputs mean nothing and
    change nothing.
    """

    mask: Tensor
    entry: Tensor
    image_mask: Tensor
    first_text: Tensor
    hidden_score: Tensor

    def __init__(self, family: Family[Any], geometry: Geometry, context: Context, *, tokens: int) -> None:
        super().__init__(family, geometry, context, first=0)
        self.tokens, self.vocab = tokens, geometry.text.vocab
        self.norm = RmsNorm(geometry.text.hidden, geometry.text.norm_eps)
        self.lm_head = nn.Linear(geometry.text.hidden, geometry.text.vocab, bias=False, device="meta")
        self.register_buffer("mask", causal_mask(tokens), persistent=False)
        # 1 at the first entry of the text part, 2 at the next ...: what exceeds the number of filled ones is masked.
        self.register_buffer("entry", torch.arange(1, context.text + 1).float()[None], persistent=False)
        self.register_buffer("image_mask", torch.zeros(1, context.seen), persistent=False)
        self.register_buffer("first_text", torch.tensor([float(context.first_text)]), persistent=False)
        self.register_buffer("hidden_score", torch.tensor([HIDDEN]), persistent=False)

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each input."""
        from runtime.bundle import TensorInfo

        return (
            TensorInfo(name="inputs_embeds", shape=(1, self.tokens, self.width), dtype="float32"),
            TensorInfo(name="positions", shape=(1, self.tokens), dtype="int64"),
            *self.context.infos("past_", self.dtype),
        )

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each output."""
        from runtime.bundle import TensorInfo

        return (
            TensorInfo(name="logits", shape=(1, self.tokens, self.vocab), dtype="float32"),
            *self.context.infos("", self.dtype, entries=self.tokens),
        )

    def forward(self, inputs_embeds: Tensor, positions: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        cos, sin = self.rotary(positions)
        filled = positions[:, :1].float() - self.first_text
        beyond = ((self.entry - filled).clamp(0.0, 1.0) * self.hidden_score).to(self.dtype)
        masks = {
            entries: torch.cat([self.image_mask[:, :entries].to(self.dtype), beyond], dim=1)
            for entries in sorted({self.context.image_entries(index) for index in range(self.context.layers)})
        }
        hidden = inputs_embeds.to(self.dtype)
        caches: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            key, value = past[2 * index][0], past[2 * index + 1][0]
            cache = Part(key, value, masks[self.context.image_entries(index)])
            out = layer(hidden, cos, sin, self.mask, None, None, cache)
            hidden = out.hidden
            caches += [out.key.unsqueeze(0), out.value.unsqueeze(0)]
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits.float(), *caches


def build_token_embedding(checkpoint: Checkpoint, *, tokens: int, precision: str = "fp32") -> TokenEmbedding:
    """The embedding of `tokens` ids with the checkpoint's weights, ready to be traced."""
    graph = TokenEmbedding(checkpoint.geometry, tokens=tokens)
    fill(graph.embed_tokens, checkpoint, "embed_tokens", PRECISIONS[precision])
    return graph.eval().requires_grad_(False)


def precise_modules(checkpoint: Checkpoint, names: Iterable[str]) -> dict[str, nn.Module]:
    """Parts of the decoder in float32, by their names in the model: of a layer, like `layers.3.mlp`, or `norm`."""
    geometry = checkpoint.geometry
    modules: dict[str, nn.Module] = {}
    for name in names:
        module: nn.Module = RmsNorm(geometry.text.hidden, geometry.text.norm_eps)
        if name != "norm":
            module = checkpoint.family.layer(geometry).get_submodule(name.split(".", 2)[2])
        fill(module, checkpoint, name, torch.float32)
        modules[name] = module.eval().requires_grad_(False)
    return modules


def build_text_graphs(
    checkpoint: Checkpoint,
    context: Context,
    *,
    precision: str = "fp32",
    quant: str | None = None,
    chunk: int = PROMPT_CHUNK,
) -> dict[str, Graph]:
    """Everything behind `vision_encoder`, by the names a bundle knows: `image_prefill`, `token_embedding`,
    `text_prefill` for `chunk` tokens at a time and `text_decoder` for one.

    They share their layers, so that memory holds each weight once; with `quant` (see export.quantize) each layer is
    quantised as soon as it is filled, and computes in fp32 around that. Ready to be traced.
    """
    family, geometry = checkpoint.family, checkpoint.geometry
    return filled_text_graphs(
        checkpoint,
        TextDecoder(family, geometry, context, tokens=chunk),
        TextDecoder(family, geometry, context, tokens=1),
        ImagePrefill(family, geometry, context),
        precision=precision,
        quant=quant,
    )


def filled_text_graphs(
    checkpoint: Checkpoint,
    whole: TextDecoder,
    one: TextDecoder,
    image: ImagePrefill,
    *,
    precision: str,
    quant: str | None,
) -> dict[str, Graph]:
    """Fills three graphs that share their layers, for many tokens, for one and for the image; and their embedding."""
    dtype = torch.float32 if quant is not None else PRECISIONS[precision]
    for index, layer in enumerate(whole.layers):
        fill(layer, checkpoint, f"layers.{index}", dtype)
        if quant is not None:
            quantize_layer(layer, quant, below_cut=index < image.first)
    fill(whole.norm, checkpoint, "norm", dtype)
    fill(whole.lm_head, checkpoint, "lm_head", dtype)
    if quant is not None:
        quantize(whole, quant)  # what is left of it: the output matrix
    one.layers, one.norm, one.lm_head = whole.layers, whole.norm, whole.lm_head
    image.layers = whole.layers[image.first :]
    decoders: dict[str, _Decoder] = {IMAGE_PREFILL: image, TEXT_PREFILL: whole, TEXT_DECODER: one}
    for graph in decoders.values():
        if dtype == torch.float16:
            graph.half()
        if isinstance(graph, TextDecoder):
            # Compared with positions, which float16 does not hold exactly.
            graph.entry, graph.first_text = graph.entry.float(), graph.first_text.float()
        graph.eval().requires_grad_(False)
    return {**decoders, TOKEN_EMBEDDING: build_token_embedding(checkpoint, tokens=whole.tokens, precision=precision)}
