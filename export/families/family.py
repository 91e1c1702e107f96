"""The interface of a model family: what an export asks of an architecture, and what it gets back. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from runtime.errors import ExportError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from export.blocks.decoder_layer import DecoderLayer
    from export.blocks.geometry import TextGeometry
    from runtime.bundle import ImageInfo, WeightsInfo

TOWER = "tower."
"""The beginning of the canonical names of all that `Family.tower` holds."""


class Geometry(Protocol):
    """The sizes of one model that every family has; a family's own class holds what else its modules need."""

    @property
    def text(self) -> TextGeometry:
        """The decoder."""

    @property
    def pixel_values(self) -> tuple[int, ...]:
        """The shape of what the tower takes, (1, channels, height, width) for a photo."""

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens as (rows, columns)."""

    @property
    def overview(self) -> tuple[int, int] | None:
        """Rows and columns of a view of the whole photo, whose tokens come before those of the grid; None without."""

    @property
    def image_tokens(self) -> int:
        """Image tokens before pruning, row ends not among them."""

    @property
    def image_token_id(self) -> int:
        """The id that stands for an image token in a prompt."""

    @property
    def least_cut(self) -> int:
        """The number of decoder layers that need every image token: those behind which `Seen.planes` are added."""

    def numbers(self) -> Mapping[str, object]:
        """The numbers by which one model of the family is told from another, by what an error calls them."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a model: its shape, and how files spell its name.

    The first of `stored` is the name in errors and what random weights are drawn by. Without `needed` no graph reads
    it, and a checkpoint may lack it; `instead` is the canonical name of the tensor that stands in where it is missing.
    """

    shape: tuple[int, ...]
    stored: tuple[str, ...]
    needed: bool = True
    instead: str | None = None


class Seen(NamedTuple):
    """What a tower makes of an image, in the decoder's width, and the keys of its last layer, heads side by side.

    Features hold what stands at `Frame.breaks`, too; nothing else here does.

    Where the family has a class token and it is asked for, `attention` is what this gives to each image token in that
    layer, averaged over heads. `planes` are added to the image tokens behind decoder layer 0, layer 1 and so on
    (DeepStack, arXiv 2406.04334).
    """

    features: Tensor  # (1, N, D), or with the ends of rows (1, T, D)
    keys: Tensor  # (1, N, Dk)
    attention: Tensor | None = None  # (1, N)
    planes: tuple[Tensor, ...] = ()  # (1, N, D) each, `Geometry.least_cut` of them


@dataclass(frozen=True)
class Frame:
    """The constant part of every prompt with its image slots, up to where the question goes on.

    `ids` has the image token's id at each of `slots` (ascending indices into it), and at each of `breaks`: tokens that
    only end a row of the image. No method chooses among these: they go on with the whole image, and with no part of it
    (see `left`). `positions` are absolute, one row
    for each axis of the rotary embedding; `places` are (t, y, x) of each image token, which distances are measured
    between; the text behind the frame begins at position `first_text`, on every axis. Between graphs no such position
    is handed on, but the number of a token in the unpruned prompt, by which each graph looks up its turn (`rotary`).
    """

    ids: tuple[int, ...]
    slots: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]
    places: tuple[tuple[int, int, int], ...]
    first_text: int
    breaks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        inside = all(0 <= slot < len(self.ids) for slot in (*self.slots, *self.breaks))
        if not self.slots or not inside or list(self.slots) != sorted(set(self.slots)):
            raise ValueError(f"a frame's slots must be ascending indices into its {len(self.ids)} ids")
        if list(self.breaks) != sorted(set(self.breaks) - set(self.slots)):
            raise ValueError("a frame's breaks must be ascending and none of its slots")
        if len(self.positions) not in (1, 3) or any(len(row) != len(self.ids) for row in self.positions):
            raise ValueError(f"a frame's positions must be 1 or 3 rows for its {len(self.ids)} ids")
        if len(self.places) != len(self.slots):
            raise ValueError(f"a frame has {len(self.places)} places for {len(self.slots)} image tokens")
        if self.first_text <= max(max(row) for row in self.positions):
            raise ValueError(f"the text cannot begin at position {self.first_text}, which the frame reaches")

    @classmethod
    def of_one_image(cls, prefix_ids: Sequence[int], image_token_id: int, grid: tuple[int, int]) -> Frame:
        """Lays out a prefix and one image of (rows, columns) behind it, whose positions count up by one."""
        rows, columns = grid
        first, after = len(prefix_ids), len(prefix_ids) + rows * columns
        return cls(
            ids=(*prefix_ids, *(image_token_id for _ in range(rows * columns))),
            slots=tuple(range(first, after)),
            positions=(tuple(range(after)),),
            places=tuple((0, y, x) for y in range(rows) for x in range(columns)),
            first_text=after,
        )

    def left(self, keep: int) -> int:
        """Tokens that the image still is behind the cut where `keep` of its slots stay."""
        return keep + (len(self.breaks) if keep == len(self.slots) else 0)

    @property
    def rows(self) -> tuple[int, int, int]:
        """How the breaks divide the image: slots before the first row, number of rows, slots of a row.

        Where there are none, all slots are before. ValueError for an image that is no such thing.
        """
        if not self.breaks:
            return len(self.slots), 0, 0
        count, first = len(self.breaks), min(self.slots[0], self.breaks[0])
        width = sum(slot > self.breaks[-2] for slot in self.slots) if count > 1 else len(self.slots)
        before = len(self.slots) - count * width
        if self.breaks != tuple(first + before + (row + 1) * (width + 1) - 1 for row in range(count)):
            raise ValueError("the breaks of a frame do not divide its image into rows of one length")
        return before, count, width

    def rotary(self, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Positions of the first `tokens` tokens of the unpruned prompt, frame and text, a row for each axis."""
        behind = range(self.first_text, self.first_text + max(0, tokens - len(self.ids)))
        return tuple((*row, *behind)[:tokens] for row in self.positions)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The ids in front of the first image token."""
        return self.ids[: self.slots[0]]


class Checkpoint(Protocol):
    """A model's weights under canonical names, whatever layout they are stored in.

    A canonical name is the path of a parameter in the graphs: `tower.<path in Family.tower>`, `embed_tokens.weight`,
    `layers.<number>.<path in Family.layer>`, `norm.weight`, `lm_head.weight`.
    """

    @property
    def family(self) -> Family[Any]:
        """The architecture that the weights are for."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face config.json."""

    @property
    def geometry(self) -> Geometry:
        """The sizes that config describes."""

    @property
    def folder(self) -> Path | None:
        """Where tokenizer and preprocessor settings lie; None for random weights."""

    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors, in order of definition."""

    def has(self, name: str) -> bool:
        """Whether a tensor of that canonical name exists."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, in the dtype it is stored in; CheckpointError when it holds NaN or infinity."""

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """A few rows of a matrix, without reading the rest: `(len(indices), columns)`."""

    def unread(self) -> tuple[str, ...]:
        """Names of stored tensors that belong to none of the model's parts, and are left alone."""

    def identity(self) -> WeightsInfo:
        """Where the weights came from, with a hash over all of them."""


class Desktop(Protocol):
    """One model by transformers' own modules, in float32 and one part at a time: what graphs are compared with."""

    def pixels(self, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The photo (height, width, 3) as transformers' own image processor prepares it: `Geometry.pixel_values`."""

    def see(self, pixel_values: Tensor) -> Seen:
        """Runs tower and projector."""

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for hidden (1, T, D) at positions (1, T), or (3, 1, T) where there are three axes."""

    def layer(self, index: int) -> nn.Module:
        """A decoder layer, which is called as transformers' models call theirs."""

    def norm(self) -> nn.Module:
        """The norm in front of the output matrix."""


G = TypeVar("G", bound=Geometry)


class Family(Protocol[G]):
    """One architecture. Its file assembles the blocks of export.blocks, and nothing outside knows it by name."""

    @property
    def name(self) -> str:
        """What a manifest calls it."""

    @property
    def model_type(self) -> str:
        """What a config.json of it calls itself."""

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """What `--model` can name of it."""

    @property
    def class_token(self) -> bool:
        """Whether its tower has a class token and, called with `attention=True`, gives the attention of it."""

    @property
    def image_marks(self) -> tuple[str, str]:
        """What its processor writes in front of and behind the image tokens, beside what chat templates write there."""

    @property
    def backends(self) -> frozenset[str] | None:
        """Names of the backends that its graphs were exported and checked with; others are refused. None for any."""

    @property
    def drop_in(self) -> bool:
        """Whether its bundles can be laid out for runtimes of other people, as far as they take the model."""

    def resized(self, size: tuple[int, int]) -> Family[G]:
        """The same for images of (height, width) pixels; RequestError where its models take one size alone."""

    def whole_config(self, folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Completes a config.json by what other files of the folder say for it."""

    def geometry(self, config: Mapping[str, Any]) -> G:
        """Reads the sizes; CheckpointError when it is no config.json of the family, or contradicts itself."""

    def tensors(self, geometry: G) -> Mapping[str, TensorEntry]:
        """Lists every tensor of the whole model by its canonical name (see `Checkpoint`)."""

    def stray(self, stored: str) -> str | None:
        """Says what to do about a stored tensor that is none of `tensors`; None for one of no part of the model."""

    def other_layout(self, stored: Sequence[str]) -> str | None:
        """Recognises a layout that is not read by the names of its tensors and says what to do; None if it is none."""

    def image(self, folder: Path | None, geometry: G) -> ImageInfo:
        """How a photo becomes pixel_values, from a checkpoint's files, or as published where there is none."""

    def frame(self, prefix_ids: Sequence[int], geometry: G) -> Frame:
        """Lays out a prompt behind the ids that a chat template puts in front of the image."""

    def tower(self, geometry: G) -> nn.Module:
        """pixel_values -> Seen, on the meta device; float32 islands are named `mlp`, `self_attn` and `projector`."""

    def layer(self, geometry: G) -> DecoderLayer:
        """Builds a decoder layer on the meta device; rotary tables and masks are its inputs."""

    def desktop(self, checkpoint: Checkpoint, device: torch.device | str) -> Desktop:
        """The same model by transformers' own modules; CheckpointError for a config that they do not take."""

    def hub_files(self, checkpoint: Checkpoint, *, image_token: str, keep: int) -> dict[str, dict[str, Any]]:
        """The config files by which a Hugging Face runtime takes `keep` image tokens, by name.

        Raises ExportError where no such runtime knows the family.
        """


class PlainFamily(Generic[G]):
    """What most families have alike; one that derives from it says what it has otherwise.

    A tower without a class token, photos of one size, one layout of files, a decoder of LLaMA's layers, bundles for
    our own runtime on the backends that new families are tried with.
    """

    name: str
    # Beginnings of the stored names of all parts that graphs are built from.
    built_parts: tuple[str, ...]
    image_marks = "", ""
    backends: frozenset[str] | None = frozenset({"onnx", "xnnpack"})
    drop_in = False

    @property
    def class_token(self) -> bool:
        """False: the tower has none."""
        return False

    def whole_config(self, folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config.json as it is: no other file completes it."""
        return config

    def stray(self, stored: str) -> str | None:
        """Says what to do about a stored tensor of a part that graphs are built from; None for one of no such part."""
        built = stored.startswith(self.built_parts)
        return "the weights belong to another model, or config.json does" if built else None

    def other_layout(self, stored: Sequence[str]) -> str | None:
        """None: there is one layout."""
        return None

    def frame(self, prefix_ids: Sequence[int], geometry: G) -> Frame:
        """Lays out prefix and image, after which the text goes on at the next position."""
        return Frame.of_one_image(prefix_ids, geometry.image_token_id, geometry.grid)

    def layer(self, geometry: G) -> DecoderLayer:
        """A layer of LLaMA's kind."""
        from export.blocks.decoder_layer import DecoderLayer

        return DecoderLayer(geometry.text)

    def hub_files(self, checkpoint: Checkpoint, *, image_token: str, keep: int) -> dict[str, dict[str, Any]]:
        """Raises ExportError: Hugging Face's runtimes work out an image's tokens themselves."""
        raise ExportError(
            f"no Hugging Face runtime takes a pruned image of {self.name}: they work out its tokens from the photo; "
            "leave --layout out"
        )


@dataclass(frozen=True)
class ModelEntry:
    """One model that `--model` can name: where its weights come from and what its prompt starts with."""

    name: str
    family: Family[Any]
    summary: str
    hub_id: str | None
    config: Mapping[str, Any]
    # Length of the stand-in prefix where no tokenizer is at hand: that of the real template with its system prompt.
    prefix_tokens: int = 35
    system_prompt: str | None = None
    # Taken instead of a backend's defaults where those would say more about the weights than about the export.
    precision: Literal["fp32", "fp16"] | None = None
    quant_text: str | None = None
    # Questions with known answers that it was made to answer: a file of JSON lines.
    questions: Path | None = None

    def __post_init__(self) -> None:
        if not self.name or self.prefix_tokens < 1:
            raise ValueError(f"a model needs a name and a prefix of at least one token, got {self.name!r}")

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes this model must have, known without any weights."""
        geometry: Geometry = self.family.geometry(self.config)
        return geometry

    @cached_property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the whole model by its canonical name."""
        return self.family.tensors(self.geometry)

    def vision_parameter_count(self, cut: int) -> int:
        """Parameters that the vision graph holds: the tower and the decoder layers in front of the cut."""
        layers = tuple(f"layers.{index}." for index in range(cut))
        return self._count(name for name in self.tensors if name.startswith((TOWER, *layers)))

    def text_parameter_count(self) -> int:
        """Parameters of the language half: embedding, all decoder layers, output matrix."""
        return self._count(name for name in self.tensors if not name.startswith(TOWER))

    def largest_parameter_count(self, cut: int, *, text: bool) -> int:
        """Numbers in the largest tensor of the vision graph or, with `text`, of the whole model."""
        seen = (TOWER, *(f"layers.{index}." for index in range(cut)))
        return max(self._count([name]) for name in self.tensors if text or name.startswith(seen))

    def _count(self, names: Iterable[str]) -> int:
        entries = (self.tensors[name] for name in names)
        return sum(math.prod(entry.shape) for entry in entries if entry.needed)


def renamed(name: str, starts: Mapping[str, str]) -> str:
    """Spells a canonical name as files do, by how they spell the first of the beginnings in `starts` that it has."""
    start = next(start for start in starts if name.startswith(start))
    return starts[start] + name.removeprefix(start)


def tensor_entries(
    shapes: Iterable[tuple[str, tuple[int, ...]]], starts: Mapping[str, str], *, tied: bool
) -> dict[str, TensorEntry]:
    """Entries of canonical names and shapes, spelled as `renamed` does; `tied` embeddings stand in for lm_head's."""
    instead = {"lm_head.weight": "embed_tokens.weight"} if tied else {}
    return {name: TensorEntry(shape, (renamed(name, starts),), instead=instead.get(name)) for name, shape in shapes}


def linear(name: str, width_in: int, width_out: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a linear layer's tensors."""
    yield f"{name}.weight", (width_out, width_in)
    if bias:
        yield f"{name}.bias", (width_out,)


def decoder_tensors(text: TextGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical names and shapes of a decoder of `DecoderLayer`s with its embedding, last norm and output matrix."""
    yield "embed_tokens.weight", (text.vocab, text.hidden)
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    for index in range(text.layers):
        base = f"layers.{index}"
        yield f"{base}.input_layernorm.weight", (text.hidden,)
        yield from linear(f"{base}.self_attn.q_proj", text.hidden, queries, bias=text.qkv_bias)
        yield from linear(f"{base}.self_attn.k_proj", text.hidden, keys, bias=text.qkv_bias)
        yield from linear(f"{base}.self_attn.v_proj", text.hidden, keys, bias=text.qkv_bias)
        yield from linear(f"{base}.self_attn.o_proj", queries, text.hidden, bias=text.out_bias)
        if text.qk_norm:
            yield f"{base}.self_attn.q_norm.weight", (text.head_dim,)
            yield f"{base}.self_attn.k_norm.weight", (text.head_dim,)
        yield f"{base}.post_attention_layernorm.weight", (text.hidden,)
        yield from linear(f"{base}.mlp.gate_proj", text.hidden, text.mlp, bias=text.mlp_bias)
        yield from linear(f"{base}.mlp.up_proj", text.hidden, text.mlp, bias=text.mlp_bias)
        yield from linear(f"{base}.mlp.down_proj", text.mlp, text.hidden, bias=text.mlp_bias)
    yield "norm.weight", (text.hidden,)
    yield "lm_head.weight", (text.vocab, text.hidden)
