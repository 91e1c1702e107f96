"""The bundle on disk: the schema of manifest.json, a reader that trusts nothing, and a writer that is atomic."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Literal, Self

import msgspec
import numpy as np

from runtime.errors import BundleError, CheckpointError, OutputError, PruneportError, RequestError
from runtime.leftovers import STAGES, make_locked, take_over
from runtime.names import LONGEST_NAME, is_text

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
# The largest number of float16.
FLOAT16_LARGEST = 65504.0
# The layout that this runtime runs; others are runtimes of other people.
OWN_LAYOUT = "pruneport"
REPORT_FILES = ("parity.json", "latency.json", "report.md", "report.html")
# The graph from pixels to image tokens. A bundle of several keeps has one for each, under names of their own.
VISION_ENCODER = "vision_encoder"
# What the harness and the phones agree to exchange; bfloat16 is absent because numpy has no such type.
DTYPES: dict[str, np.dtype[np.generic]] = {
    name: np.dtype(name) for name in ("float32", "float16", "int64", "int32", "int8", "uint8", "bool")
}

_MAX_MANIFEST_BYTES = 16 * 2**20
_MAX_TENSOR_ELEMENTS = 2**40
_HASH_CHUNK_BYTES = 4 * 2**20
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CREATED = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z")
_RESAMPLE_BY_PIL_CODE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}

Dim = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
PositiveCount = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
SettingCount = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_NAME)]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all records of the manifest share: immutable, named fields only, unknown fields refused."""


def _safe_relative(path: str) -> str:
    """Returns `path` when it stays inside a folder on every system that reads bundles; ValueError otherwise."""
    parts = path.split("/")
    inside = all(part not in ("", ".", "..") for part in parts)
    if not inside or "\\" in path or ":" in path or any(ord(c) < 32 for c in path) or len(path) > 512:
        raise ValueError(f"{path!r} is not a plain relative path inside the bundle (folders separated by /, no ..)")
    return path


class TensorInfo(_Record, frozen=True):
    """Name, shape and dtype (a key of DTYPES) of one input or output.

    `dynamic` lists axes that may have any length up to what `shape` says.
    """

    name: Name
    shape: tuple[Dim, ...]
    dtype: str
    dynamic: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        if any(axis >= len(self.shape) for axis in self.dynamic):
            raise ValueError(f"dynamic={list(self.dynamic)} of tensor {self.name!r} names an axis beyond {self.shape}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} of tensor {self.name!r} must be one of {', '.join(DTYPES)}")
        if math.prod(self.shape) > _MAX_TENSOR_ELEMENTS:
            raise ValueError(f"shape={list(self.shape)} of tensor {self.name!r} has more than 2**40 elements")

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        return DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize

    def with_open(self, *axes: int) -> Self:
        """The same with these axes open."""
        return msgspec.structs.replace(self, dynamic=axes)

    def fits(self, dtype: str, shape: tuple[object, ...]) -> bool:
        """Whether a tensor of that dtype and shape is one; a size that is no number passes where it is dynamic."""
        if dtype != self.dtype or len(shape) != len(self.shape):
            return False
        return all(
            size == most or (axis in self.dynamic and (not isinstance(size, int) or size < most))
            for axis, (size, most) in enumerate(zip(shape, self.shape, strict=True))
        )

    def __str__(self) -> str:
        sizes = ", ".join(f"<={size}" if axis in self.dynamic else str(size) for axis, size in enumerate(self.shape))
        return f"{self.name} {self.dtype}[{sizes}]"


class OutsideOp(_Record, frozen=True):
    """One kind of operator a delegate left to the plain runtime, how often, and why."""

    op: Name
    count: Count
    reason: str


class DelegateCoverage(_Record, frozen=True):
    """How much of a graph one delegate took when it was lowered.

    `runs`, where the order is known: in the order they are executed, the nodes of each partition, and as negative
    numbers those outside between two of them. `by_list`: no converter and no engine said so, but a list of operators.
    """

    delegate: Name
    partitions: Count
    nodes: Count
    outside: tuple[OutsideOp, ...] = ()
    by_list: bool = False
    runs: tuple[Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)], ...] = ()

    def __post_init__(self) -> None:
        taken, left = sum(run for run in self.runs if run > 0), -sum(run for run in self.runs if run < 0)
        if self.runs and (0 in self.runs or (taken, left) != (self.nodes, self.outside_nodes)):
            raise ValueError(
                f"runs of {self.delegate!r} hold {taken} nodes taken and {left} outside, not {self.nodes} and "
                f"{self.outside_nodes}"
            )

    @property
    def outside_nodes(self) -> int:
        """Nodes the delegate left to the plain runtime."""
        return sum(op.count for op in self.outside)


class GraphInfo(_Record, frozen=True):
    """One exported graph: its files, the engine it is for, its inputs and outputs in order, and who runs it.

    For Core ML `file` is a package, which is a folder: `extra_files` are the files in it. `states` are buffers that the
    engine keeps between runs and that the graph writes; graphs of one file have those of one name in common.
    `arithmetic` names what its numbers pass through, precisions and quantisation schemes: the coarsest of them decides
    how near its outputs must come to the desktop's.
    """

    name: Name
    file: str
    engine: Literal["coreml", "executorch", "onnxruntime"]
    arithmetic: Annotated[tuple[Name, ...], msgspec.Meta(min_length=1)]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    extra_files: tuple[str, ...] = ()
    coverage: tuple[DelegateCoverage, ...] = ()
    states: tuple[TensorInfo, ...] = ()

    def __post_init__(self) -> None:
        for file in (self.file, *self.extra_files):
            _safe_relative(file)
        if self.engine == "coreml" and not any(file.startswith(f"{self.file}/") for file in self.extra_files):
            raise ValueError(f"graph {self.name!r} lists no file of its package {self.file}")
        for kind, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [tensor.name for tensor in tensors]
            if not names:
                raise ValueError(f"graph {self.name!r} has no {kind}")
            if len(set(names)) != len(names):
                raise ValueError(f"graph {self.name!r} names two {kind} alike: {names}")
        taken = [info.name for info in (*self.inputs, *self.states)]
        if len(set(taken)) != len(taken):
            raise ValueError(f"graph {self.name!r} names two inputs or states alike: {taken}")

    @property
    def is_open(self) -> bool:
        """True for a graph that takes any number of tokens."""
        return any(info.dynamic for info in self.inputs)

    @property
    def cache(self) -> tuple[TensorInfo, ...]:
        """The KV cache, be it inputs or states."""
        return tuple(info for info in (*self.inputs, *self.states) if info.name.startswith("past_"))

    @property
    def files(self) -> tuple[str, ...]:
        """Everything that must be there, as plain files."""
        return self.extra_files if self.engine == "coreml" else (self.file, *self.extra_files)


class WeightsInfo(_Record, frozen=True):
    """Where the weights came from; `seed` is set for random weights and for nothing else."""

    source: Literal["checkpoint", "random"]
    id: Name
    sha256: str
    seed: int | None = None

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"weights sha256={self.sha256!r} must be 64 lower-case hexadecimal digits")
        if (self.source == "random") != (self.seed is not None):
            raise ValueError(f"weights seed={self.seed} must be given with source='random' and only then")


class PruneInfo(_Record, frozen=True):
    """What the pruner inside the graph does; `pruned` is False for the twin, which keeps every token by no method.

    `grid` are rows and columns of the image tokens. Where a photo is seen in tiles it is that of all tiles, and
    `overview` is the grid of the view of the whole photo, whose tokens come first.
    `settings` are the constants of the `method`, by its own names; `arithmetic` is what the pruner is computed in.
    `cut` is the first decoder layer that sees fewer tokens; 0 where they are pruned behind the projector.
    """

    cut: Annotated[int, msgspec.Meta(ge=0, le=10_000)]
    image_tokens: PositiveCount
    keep: PositiveCount
    grid: tuple[PositiveCount, PositiveCount]
    pruned: bool
    method: Name | None
    settings: dict[Name, SettingCount | float]
    arithmetic: Name
    overview: tuple[PositiveCount, PositiveCount] | None = None

    def __post_init__(self) -> None:
        rows, columns = self.grid
        if rows * columns + self.overview_tokens != self.image_tokens:
            behind = f" behind overview={self.overview[0]} x {self.overview[1]}" if self.overview else ""
            raise ValueError(f"grid={rows} x {columns}{behind} must hold image_tokens={self.image_tokens}")
        if self.keep > self.image_tokens:
            raise ValueError(f"keep={self.keep} must lie in 1..{self.image_tokens} (image_tokens)")
        if not self.pruned and self.keep != self.image_tokens:
            raise ValueError(f"keep={self.keep} must equal image_tokens={self.image_tokens} when pruned is false")
        if self.pruned != (self.method is not None):
            raise ValueError(f"method={self.method!r} must be named when pruned is true, and only then")
        for name, value in self.settings.items():
            if not math.isfinite(value):
                raise ValueError(f"settings.{name}={value} must be finite")

    @property
    def overview_tokens(self) -> int:
        """How many of the image tokens come before those of the grid."""
        return math.prod(self.overview) if self.overview else 0


class TilesInfo(_Record, frozen=True):
    """A photo in tiles: squeezed into `resize` (height, width), in the middle of as many tiles as `grid` says.

    Tiles are (rows, columns), each as large as `ImageInfo.size`; around the photo they are black. On sides that differ
    by a pixel, the right and the lower one are wider.
    """

    resize: tuple[Annotated[int, msgspec.Meta(ge=1, le=8192)], Annotated[int, msgspec.Meta(ge=1, le=8192)]]
    grid: tuple[Annotated[int, msgspec.Meta(ge=1, le=64)], Annotated[int, msgspec.Meta(ge=1, le=64)]]


class PixelsInfo(_Record, frozen=True):
    """What the model's own processor makes of a photo, of any size: a token for each square of so many pixels an edge.

    It scales a photo that has more pixels than `most`, or fewer than `least`. The graph takes one size alone, so that
    this says only how many image tokens a photo would have had.
    """

    token: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    least: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    most: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

    def __post_init__(self) -> None:
        if self.least > self.most:
            raise ValueError(f"pixels.least={self.least} must be at most pixels.most={self.most}")


class PinpointsInfo(_Record, frozen=True):
    """What the model's own processor makes of a photo, of any size: the whole, and tiles at the best of `sizes`.

    These are (height, width) in pixels of all tiles, each of which has `tile` pixels and `side` tokens an edge; tokens
    of more than `most` tiles are averaged. The graph takes one size alone, so that this says only how many image tokens
    a photo would have had.
    """

    sizes: Annotated[
        tuple[tuple[Annotated[int, msgspec.Meta(ge=1, le=8192)], Annotated[int, msgspec.Meta(ge=1, le=8192)]], ...],
        msgspec.Meta(min_length=1),
    ]
    tile: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    side: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    most: Annotated[int, msgspec.Meta(ge=1, le=10_000)] | None = None

    def __post_init__(self) -> None:
        if any(edge % self.tile for size in self.sizes for edge in size):
            raise ValueError(f"pinpoints.sizes={self.sizes} must be whole tiles of {self.tile} pixels")


class ImageInfo(_Record, frozen=True):
    """How a photo becomes pixel_values: shortest edge to `resize_shortest`, centre crop to `size` (height, width),
    times `rescale`, minus `mean`, over `std`, per RGB channel. Without the crop the photo is squeezed into `size`
    and `resize_shortest` has no effect. With `tiles` pixel_values are several pictures: first that of the whole photo,
    then the tiles, row by row. `pixels` or `pinpoints` tell of models that take photos of any size themselves."""

    size: tuple[Annotated[int, msgspec.Meta(ge=1, le=8192)], Annotated[int, msgspec.Meta(ge=1, le=8192)]]
    resize_shortest: Annotated[int, msgspec.Meta(ge=1, le=8192)]
    rescale: Annotated[float, msgspec.Meta(gt=0)]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["bicubic", "bilinear", "lanczos", "nearest"] = "bicubic"
    color: Literal["RGB"] = "RGB"
    do_center_crop: bool = True
    tiles: TilesInfo | None = None
    pixels: PixelsInfo | None = None
    pinpoints: PinpointsInfo | None = None

    def __post_init__(self) -> None:
        if self.tiles and any(
            edge > count * size for edge, count, size in zip(self.tiles.resize, self.tiles.grid, self.size, strict=True)
        ):
            raise ValueError(f"tiles.resize={self.tiles.resize} must fit into {self.tiles.grid} tiles of {self.size}")
        numbers = (self.rescale, *self.mean, *self.std)
        if not all(math.isfinite(number) for number in numbers) or min(self.std) <= 0:
            raise ValueError(f"rescale, mean and std must be finite and std positive, not {numbers}")
        if self.do_center_crop and self.resize_shortest < max(self.size):
            raise ValueError(
                f"resize_shortest={self.resize_shortest} must be at least the crop {self.size[0]} x {self.size[1]}, "
                "or the crop would reach outside the photo"
            )

    @property
    def any_size(self) -> bool:
        """Whether the model takes photos of any size, whatever the graph does."""
        return self.pixels is not None or self.pinpoints is not None

    @classmethod
    def from_preprocessor(cls, config: Mapping[str, object]) -> Self:
        """Reads the settings of a Hugging Face preprocessor_config.json of the CLIP kind.

        Raises CheckpointError for a setting that would change the pixels in a way `runtime.image` does not reproduce.
        """
        for flag in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
            if config.get(flag, True) is not True:
                raise CheckpointError(f"preprocessor_config.json says {flag}={config[flag]!r}; only true is supported")
        if config.get("do_pad"):
            raise CheckpointError("preprocessor_config.json says do_pad=true; only a centre crop is supported")
        try:
            do_center_crop = bool(config.get("do_center_crop", True))
            # Without a crop, a shortest edge alone would make the shape depend on the photo; graphs are static.
            crop = config["crop_size"] if do_center_crop else config["size"]
            height, width = _edge(crop, "height"), _edge(crop, "width")
            shortest = _edge(config["size"], "shortest_edge") if do_center_crop else min(height, width)
            resample = _RESAMPLE_BY_PIL_CODE[msgspec.convert(config.get("resample", 3), int)]
            return msgspec.convert(
                {
                    "size": (height, width),
                    "resize_shortest": shortest,
                    "resample": resample,
                    "rescale": config.get("rescale_factor", 1 / 255),
                    "mean": config["image_mean"],
                    "std": config["image_std"],
                    "do_center_crop": do_center_crop,
                },
                cls,
            )
        except (KeyError, msgspec.ValidationError) as err:
            raise CheckpointError(
                f"preprocessor_config.json cannot be used: {err} (needed: size.shortest_edge with crop_size, or "
                "size.height and size.width without a crop; resample 0..3, rescale_factor, image_mean, image_std)"
            ) from err


def _edge(size: object, key: str) -> int:
    """One edge out of 336 or of a mapping such as {"shortest_edge": 336}; KeyError when the mapping lacks it."""
    return msgspec.convert(size[key] if isinstance(size, Mapping) else size, int)


class ChatTemplate(_Record, frozen=True):
    """The checkpoint's chat template as Jinja, and what it gets beside the question: a system prompt, special tokens.

    `special_tokens` are the variables `bos_token`, `eos_token` ... with their texts.
    """

    text: str
    system: str | None = None
    special_tokens: dict[str, str] = {}


class PromptInfo(_Record, frozen=True):
    """The conversation around the image: ids and text before it, text after it, and the ids with a meaning.

    `template` is what makes it of a question. `suffix_text` serves who has no Jinja: the question, stripped of white
    space at both ends where `trims_question`, goes in the place of `{question}`. It is None where that would not be
    what the template makes. Without any text, `prefix_ids` are a stand-in.
    """

    prefix_ids: tuple[TokenId, ...]
    prefix_text: str | None = None
    suffix_text: str | None = None
    special_ids: dict[str, TokenId] = {}
    trims_question: bool = False
    template: ChatTemplate | None = None


class FrameInfo(_Record, frozen=True):
    """The constant part of every prompt: `before` tokens, `image` tokens as many as there are before pruning.

    The first token of a text stands at the position `first_text`, whatever was dropped. Positions number the tokens of
    the unpruned prompt; what the rotary embedding makes of them is inside the graphs. `breaks`, ascending, are those of
    tokens that only end a row of the image. They are no image tokens: the layers before the cut see them, and those
    behind it where nothing is pruned.
    """

    before: Count
    image: PositiveCount
    first_text: PositiveCount
    breaks: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        inside = all(self.before <= at < self.first_text for at in self.breaks)
        if not inside or list(self.breaks) != sorted(set(self.breaks)):
            raise ValueError("breaks must be ascending positions inside the image")

    def image_indices(self, positions: np.ndarray) -> np.ndarray:
        """Which image tokens stand at positions (T,) in the unpruned prompt: (T,) int64, -1 for a break."""
        breaks = np.asarray(self.breaks, np.int64)
        indices: np.ndarray = positions - self.before - np.searchsorted(breaks, positions)
        return np.where(np.isin(positions, breaks), -1, indices).astype(np.int64)


class TextInfo(_Record, frozen=True):
    """How text goes through the text graphs: `chunk` tokens at a time or one, with room for `tokens` in the KV cache.

    `end_ids` end an answer.
    """

    tokens: PositiveCount
    chunk: PositiveCount
    end_ids: tuple[TokenId, ...] = ()


class GoldenInfo(_Record, frozen=True):
    """The desktop's inputs and outputs, and what made them: device, torch version, photo."""

    file: str
    device: Name
    torch: Name
    photo: Name

    def __post_init__(self) -> None:
        _safe_relative(self.file)


class KeepInfo(_Record, frozen=True):
    """One keep of a bundle that has several: how it prunes, its vision graph, and its golden file."""

    prune: PruneInfo
    graph: Name
    golden: str

    def __post_init__(self) -> None:
        _safe_relative(self.golden)


class MadeInfo(_Record, frozen=True):
    """Which backend lowered the graphs of one part, in what and for what: see TargetInfo."""

    backend: Name
    precision: Literal["fp32", "fp16"]
    soc: Name | None = None
    min_os: Name | None = None


class TargetInfo(_Record, frozen=True):
    """What the graphs were lowered for; `precision` is that of graphs without a quantisation scheme.

    A quantised graph computes in fp32 what is not quantised. `soc` is the one chip that they run on, None for any;
    `min_os` the oldest version of the phone's system that runs them, `17` for iOS 17, None where that is not known.
    Where the text graphs are another backend's, `text` says all that of them, and the fields here of the vision graph.
    """

    name: Name
    backend: Name
    precision: Literal["fp32", "fp16"]
    soc: Name | None = None
    min_os: Name | None = None
    quant_vision: Name | None = None
    quant_text: Name | None = None
    text: MadeInfo | None = None

    @property
    def parts(self) -> dict[str, tuple[MadeInfo, str | None]]:
        """Who made each part, and its quantisation scheme, by the part's name."""
        vision = MadeInfo(backend=self.backend, precision=self.precision, soc=self.soc, min_os=self.min_os)
        return {"vision": (vision, self.quant_vision), "text": (self.text or vision, self.quant_text)}


class RangesInfo(_Record, frozen=True):
    """How near a graph comes to what float16 holds: its largest absolute number on `photos`, and where it is.

    `islands` are the modules that compute in float32 because on another photo, with numbers `safety` times as large,
    float16 might not do.
    """

    worst_module: Name
    worst_value: Annotated[float, msgspec.Meta(ge=0)]
    safety: Annotated[float, msgspec.Meta(ge=1)]
    photos: tuple[Name, ...]
    islands: tuple[Name, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.worst_value) and math.isfinite(self.safety)):
            raise ValueError(f"worst_value={self.worst_value} and safety={self.safety} must be finite")

    def __str__(self) -> str:
        count = len(self.islands)
        islands = f"{count} module{'s' if count > 1 else ''} computed in fp32: {', '.join(self.islands)}"
        return (
            f"worst layer {self.worst_module} reaches {self.worst_value:.4g} of {FLOAT16_LARGEST:.0f} "
            f"(safety factor {self.safety:g}) on {len(self.photos)} photo{'s' if len(self.photos) != 1 else ''}; "
            + (islands if count else "no module needs fp32")
        )


class CalibrationInfo(_Record, frozen=True):
    """How many photos the vision graph was quantised with, the sha256 of their pixels, and the way to find ranges."""

    photos: PositiveCount
    sha256: str
    method: Name

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"calibration sha256={self.sha256!r} must be 64 lower-case hexadecimal digits")


class FileInfo(_Record, frozen=True):
    """What a file of the bundle must hash to."""

    sha256: str
    size_bytes: Count

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"sha256={self.sha256!r} must be 64 lower-case hexadecimal digits")


class Manifest(_Record, frozen=True):
    """manifest.json. `files` covers every file of the bundle but the manifest itself.

    `layout` names the runtime for which the files lie as it expects them; where that is not our own, `text` is None.
    `ranges` is None where the vision graph does not compute in float16, and so is `text_ranges` for the text graphs.
    `keeps` is empty in a bundle of one keep. Of several it lists each, the default first, whose `prune` and `golden`
    stand here, too. Each has a vision graph of its own; the other graphs serve all, and have room for the largest.
    """

    name: str
    model: Name
    family: Name
    created_utc: str
    weights: WeightsInfo
    target: TargetInfo
    prune: PruneInfo
    graphs: tuple[GraphInfo, ...]
    image: ImageInfo
    prompt: PromptInfo
    frame: FrameInfo
    golden: GoldenInfo
    tools: dict[str, str]
    text: TextInfo | None = None
    layout: Name = OWN_LAYOUT
    ranges: RangesInfo | None = None
    text_ranges: RangesInfo | None = None
    calibration: CalibrationInfo | None = None
    keeps: tuple[KeepInfo, ...] = ()
    files: dict[str, FileInfo] = {}
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version={self.schema_version} must be {SCHEMA_VERSION}")
        if not _FOLDER_NAME.fullmatch(self.name):
            raise ValueError(f"name={self.name!r} must be letters, digits, '.', '_' and '-', at most 128 of them")
        if not _CREATED.fullmatch(self.created_utc):
            raise ValueError(f"created_utc={self.created_utc!r} must look like 2026-01-31T12:00:00Z")
        names = [graph.name for graph in self.graphs]
        if not names:
            raise ValueError("graphs is empty; a bundle holds at least one graph")
        if len(set(names)) != len(names):
            raise ValueError(f"two graphs are named alike: {names}")
        if self.keeps:
            self._check_keeps(names)
        for what, count, stated in (
            ("prompt.prefix_ids", len(self.prompt.prefix_ids), self.frame.before),
            ("prune.image_tokens", self.prune.image_tokens, self.frame.image),
        ):
            if count != stated:
                raise ValueError(f"frame says {stated} tokens where {what} has {count}")
        for file in self.files:
            _safe_relative(file)
        if MANIFEST in self.files:
            raise ValueError(f"files lists {MANIFEST}, which cannot hold its own hash")

    def _check_keeps(self, graphs: list[str]) -> None:
        counts = [info.prune.keep for info in self.keeps]
        own = [info.graph for info in self.keeps]
        if len(counts) < 2 or len(set(counts)) != len(counts):
            raise ValueError(f"keeps lists {counts}; it must be empty, or list two keeps or more, each once")
        if len(set(own)) != len(own) or not set(own) <= set(graphs):
            raise ValueError(f"keeps names the graphs {own}, which must differ and be among {graphs}")
        if VISION_ENCODER in graphs:
            raise ValueError(f"a bundle of several keeps has no graph {VISION_ENCODER!r}, but one for each keep")
        if len({info.golden for info in self.keeps}) != len(own):
            raise ValueError("two keeps have the same golden file")
        if (self.keeps[0].prune, self.keeps[0].golden) != (self.prune, self.golden.file):
            raise ValueError("prune and golden must be those of the first of keeps")
        same = [(info.prune.cut, info.prune.image_tokens, info.prune.grid, info.prune.overview) for info in self.keeps]
        if len(set(same)) != 1:
            raise ValueError(f"keeps differ in their cut, image_tokens or grid: {same}")

    @property
    def needed_files(self) -> tuple[str, ...]:
        """The files without which the bundle cannot be checked, in a fixed order."""
        goldens = dict.fromkeys((self.golden.file, *(info.golden for info in self.keeps)))
        return (*(file for graph in self.graphs for file in graph.files), *goldens)


class _Version(msgspec.Struct):
    """The one field that is read before the rest, so that a newer bundle gets a message of its own."""

    schema_version: int


def of_keep(file: str, keep: int) -> str:
    """The name of a file of which each keep has one: `golden.safetensors` -> `golden-keep64.safetensors`."""
    stem, dot, ending = file.partition(".")
    return f"{stem}-keep{keep}{dot}{ending}"


def is_report(file: str) -> bool:
    """Whether a file of a bundle is a report, be it of all keeps or of one."""
    return re.sub(r"-keep[0-9]+(?=\.)", "", file) in REPORT_FILES


class Bundle:
    """A bundle that was read from disk; made by `read_bundle`.

    One of several keeps has no `vision_encoder`: `at` gives a view of it for one keep, whose manifest, graphs and
    golden are those of a bundle of that keep alone.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._whole = self
        # In a view, the graphs as their files call them, by the names that the view has for them.
        self._stored: dict[str, GraphInfo] = {}
        self._hashed: dict[str, tuple[int, int, int]] = {}

    @property
    def keeps(self) -> tuple[int, ...]:
        """How many image tokens it can keep, the default first; of a view its own."""
        return tuple(info.prune.keep for info in self.manifest.keeps) or (self.manifest.prune.keep,)

    @property
    def views(self) -> tuple[Bundle, ...]:
        """The bundle at each of its keeps; itself where it has one."""
        return tuple(self.at(keep) for keep in self.keeps)

    @property
    def siblings(self) -> tuple[Bundle, ...]:
        """The views of the same bundle, this one among them, which comes first."""
        others = tuple(view for view in self._whole.views if view.keeps != self.at().keeps)
        return (self.at(), *others)

    @property
    def is_view(self) -> bool:
        """True for one of several keeps."""
        return self._whole is not self

    @property
    def title(self) -> str:
        """Its name, and in a view the keep."""
        return f"{self.manifest.name}, keep {self.manifest.prune.keep}" if self.is_view else self.manifest.name

    def at(self, keep: int | None = None) -> Bundle:
        """The bundle at one of its keeps, by default the first; itself where it has no other.

        RequestError for a keep that it does not have.
        """
        if keep in (None, self.manifest.prune.keep) and not self.manifest.keeps:
            return self
        whole = self._whole
        manifest = whole.manifest
        chosen = next((info for info in manifest.keeps if keep in (None, info.prune.keep)), None)
        if chosen is None:
            only = " alone" if len(whole.keeps) == 1 else ""
            raise RequestError(
                f"keep={keep}: {self.path} has the keep{'s' * (not only)} {', '.join(map(str, whole.keeps))}{only}; "
                f"take one that it has, or export again with --keep {','.join(map(str, (*whole.keeps, keep)))}"
            )
        stored = whole.graph(chosen.graph)
        shared = {graph.name for graph in manifest.graphs} - {info.graph for info in manifest.keeps}
        view = Bundle(
            self.path,
            msgspec.structs.replace(
                manifest,
                prune=chosen.prune,
                golden=msgspec.structs.replace(manifest.golden, file=chosen.golden),
                graphs=tuple(
                    msgspec.structs.replace(graph, name=VISION_ENCODER) if graph is stored else graph
                    for graph in manifest.graphs
                    if graph is stored or graph.name in shared
                ),
                keeps=(),
            ),
        )
        view._whole, view._hashed, view._stored = whole, whole._hashed, {VISION_ENCODER: stored}
        return view

    def stored(self, name: str) -> GraphInfo:
        """The graph of that name as its file calls it; BundleError names those there are."""
        return self._stored.get(name) or self.graph(name)

    @property
    def size_bytes(self) -> int:
        """Bytes of all listed files together."""
        return sum(info.size_bytes for info in self.manifest.files.values())

    @property
    def key(self) -> str:
        """What its manifest hashes to, in 16 digits: names where it lies on a device, and what was packed of it."""
        return sha256_of(self.path / MANIFEST)[:16]

    @property
    def identity(self) -> str:
        """Name and what the graphs' files hash to: two exports of one name differ in it, and so do keeps of one."""
        files = sorted({file for graph in self.manifest.graphs for file in graph.files})
        listed = "".join(f"{file} {self.manifest.files[file].sha256}\n" for file in files)
        return f"{self.title} {hashlib.sha256(listed.encode()).hexdigest()[:16]}"

    def graph(self, name: str) -> GraphInfo:
        """The graph of that name; BundleError names those there are."""
        for graph in self.manifest.graphs:
            if graph.name == name:
                return graph
        names = ", ".join(graph.name for graph in self.manifest.graphs)
        raise BundleError(f"{self.path} has no graph {name!r}; it has: {names}")

    def file(self, relative: str) -> Path:
        """The path of a listed file, after making sure that it is a regular file of the listed size inside the bundle.

        Symbolic links are refused, whether or not they leave the bundle: a copy on a phone would not have them.
        """
        if relative not in self.manifest.files:
            raise BundleError(f"{self.path / MANIFEST} does not list {relative!r} among its files; export again")
        path = self.path
        for part in _safe_relative(relative).split("/"):
            path = path / part
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:
                raise BundleError(f"{self.path} lacks {relative}, which its manifest lists; export again") from None
            except OSError as err:
                raise BundleError(f"{path} cannot be read: {err.strerror}") from err
            if stat.S_ISLNK(mode):
                raise BundleError(f"{path} is a symbolic link; a bundle may hold only plain files and folders")
        if not stat.S_ISREG(mode):
            raise BundleError(f"{path} is not a plain file")
        size_bytes, expected = path.stat().st_size, self.manifest.files[relative].size_bytes
        if size_bytes != expected:
            raise BundleError(
                f"{path} has {size_bytes} bytes, its manifest says {expected}: it is truncated or was changed; "
                "copy the bundle again or export again"
            )
        return path

    def check_files(self) -> None:
        """Hashes every listed file; BundleError names the first that does not match.

        What was hashed for another keep and is as it was then is not hashed again.
        """
        for relative, info in self.manifest.files.items():
            path = self.file(relative)
            status = path.stat()
            as_it_is = status.st_ino, status.st_size, status.st_mtime_ns
            if self.is_view and self._hashed.get(relative) == as_it_is:
                continue
            found = sha256_of(path)
            if found != info.sha256:
                raise BundleError(
                    f"{path} was changed: sha256 {found[:16]}…, its manifest says {info.sha256[:16]}…; "
                    "copy the bundle again or export again"
                )
            self._hashed[relative] = as_it_is

    @property
    def photo_size(self) -> tuple[int, int] | None:
        """Height and width of the photo that the bundle was checked with; None where the golden file does not hold it.

        Raises BundleError.
        """
        from safetensors import SafetensorError, safe_open

        path = self.file(self.manifest.golden.file)
        try:
            with safe_open(path, "np") as tensors:
                if "photo" not in tensors.keys():  # noqa: SIM118  # it has no other way to ask
                    return None
                height, width, _ = tensors.get_slice("photo").get_shape()
        except (SafetensorError, OSError, ValueError) as err:
            raise BundleError(f"{path} is not a readable safetensors file ({err}); export again") from err
        return height, width

    def golden(self) -> dict[str, np.ndarray]:
        """The desktop's inputs and outputs by name, e.g. `vision_encoder.in.pixel_values`."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.file(self.manifest.golden.file)
        try:
            return load_file(path)
        # KeyError and the rest: a header may be well-formed and name a dtype or an offset that numpy cannot follow.
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as err:
            raise BundleError(f"{path} is not a readable safetensors file ({err}); export again") from err


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads and validates a bundle's manifest and makes sure that every listed file is there in its listed size.

    Hashes are left to `Bundle.check_files`. Raises BundleError.
    """
    path = Path(path)
    if not is_text(path):
        raise BundleError(f"{path} has a name that is not in UTF-8, which engines cannot open; rename it")
    manifest_path = path / MANIFEST
    try:
        size_bytes = manifest_path.stat().st_size
        if size_bytes > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{manifest_path} has {size_bytes} bytes; a manifest has at most {_MAX_MANIFEST_BYTES}")
        raw = manifest_path.read_bytes()
    except FileNotFoundError:
        what = f"has no {MANIFEST}" if path.is_dir() else "does not exist"
        raise BundleError(f"{path} {what}; a bundle is the folder an export wrote, e.g. bundles/<name>") from None
    except NotADirectoryError:
        raise BundleError(f"{path} is a file; a bundle is the folder an export wrote, e.g. bundles/<name>") from None
    except OSError as err:
        raise BundleError(f"{manifest_path} cannot be read: {err.strerror}") from err
    bundle = Bundle(path, _decode(raw, manifest_path))
    for relative in bundle.manifest.needed_files:
        bundle.file(relative)
    for relative in bundle.manifest.files:
        bundle.file(relative)
    return bundle


def _decode(raw: bytes, where: Path) -> Manifest:
    try:
        version = msgspec.json.decode(raw, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{where} has schema_version {version}, this pruneport reads {SCHEMA_VERSION}; "
                "install a newer pruneport (pip install --upgrade pruneport)"
            )
        if version < SCHEMA_VERSION:
            raise BundleError(
                f"{where} has schema_version {version}, of an earlier pruneport; this one reads {SCHEMA_VERSION}: "
                "export again"
            )
        return msgspec.json.decode(raw, type=Manifest)
    except msgspec.ValidationError as err:
        raise BundleError(f"{where} does not follow the bundle schema: {err}; export again") from err
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BundleError(f"{where} is not JSON: {err}; export again") from err
    except RecursionError:
        raise BundleError(f"{where} is nested too deeply to be a manifest; export again") from None


class BundleWriter:
    """Writes a bundle beside its target and renames it when it is whole.

    with BundleWriter(Path("bundles/x")) as writer:
        (writer.path / "vision_encoder.pte").write_bytes(...)
        writer.commit(manifest)

    Leaving the block without a commit, by whatever exception, removes what was written. An OSError inside the block
    (disk full, read-only) comes out as OutputError. `path` is there inside the block only.

    With `resume` the folder of a killed export is taken over, if what its STAGES holds is what `resume` says yes to;
    `resumed` then is True, and the folder holds what it held.
    """

    path: Path

    def __init__(self, target_dir: Path, *, resume: Callable[[bytes], bool] | None = None) -> None:
        self.target_dir = Path(target_dir)
        self.resumed = False
        self._resume = resume
        self._lock: int | None = None
        self._made_parents: list[Path] = []
        self._hashed: dict[str, tuple[int, int, FileInfo]] = {}
        self._committed = False

    def __enter__(self) -> Self:
        if self.target_dir.exists() or self.target_dir.is_symlink():
            raise OutputError(
                f"{self.target_dir} already exists and is never overwritten; remove it or choose another output folder"
            )
        try:
            missing = [p for p in (self.target_dir.parent, *self.target_dir.parent.parents) if not p.exists()]
            for parent in reversed(missing):
                parent.mkdir()
                self._made_parents.append(parent)
            taken = take_over(self.target_dir, self._resume) if self._resume is not None else None
            self.resumed = taken is not None
            self.path, self._lock = taken or make_locked(self.target_dir)
        except OSError as err:
            self._clean_up()
            raise self._output_error(err) from err
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._committed:
            self._clean_up()
        self._unlock()
        if isinstance(error, OSError) and not isinstance(error, PruneportError):
            raise self._output_error(error) from error

    def write_manifest(self, manifest: Manifest) -> Manifest:
        """Hashes every file there is, writes manifest.json with the hashes, and returns that manifest."""
        files = {}
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path).as_posix()
            if path.is_file() and relative not in (MANIFEST, STAGES):
                files[relative] = self.hashed(relative)
        complete = msgspec.structs.replace(manifest, files=files)
        raw = msgspec.json.format(msgspec.json.encode(complete), indent=2)
        # What a later reader would refuse must not be written: a struct can be built with values of the wrong type.
        _decode(raw, self.path / MANIFEST)
        (self.path / MANIFEST).write_bytes(raw + b"\n")
        return complete

    def commit(self, manifest: Manifest) -> Bundle:
        """Writes the manifest for the last time, flushes everything to disk and gives the bundle its name."""
        self.write_manifest(manifest)
        read_bundle(self.path)
        folders = [self.path, *(path for path in self.path.rglob("*") if path.is_dir())]
        for path in [*(path for path in self.path.rglob("*") if path.is_file()), *folders]:
            _fsync(path)
        if self.target_dir.exists():
            raise OutputError(f"{self.target_dir} appeared while it was being made; remove it and export again")
        (self.path / STAGES).unlink(missing_ok=True)
        _fsync(self.path)
        os.rename(self.path, self.target_dir)
        self._committed = True
        _fsync(self.target_dir.parent)
        return read_bundle(self.target_dir)

    def hashed(self, relative: str) -> FileInfo:
        """Hash and size of a file that lies in `path`; it is read once as long as it stays as it is."""
        path = self.path / relative
        status = path.stat()
        known = self._hashed.get(relative)
        if known is not None and known[:2] == (status.st_size, status.st_mtime_ns):
            return known[2]
        info = FileInfo(sha256=sha256_of(path), size_bytes=status.st_size)
        self._hashed[relative] = (status.st_size, status.st_mtime_ns, info)
        return info

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clean_up(self) -> None:
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
        for parent in reversed(self._made_parents):
            try:
                parent.rmdir()
            except OSError:  # somebody else put something there: theirs to keep
                break

    def _output_error(self, err: OSError) -> OutputError:
        inside = err.filename is None or str(err.filename).startswith(str(self.target_dir.parent))
        elsewhere = "" if inside else f" ({err.filename})"
        return OutputError(
            f"{self.target_dir} cannot be written: {err.strerror or err}{elsewhere}; nothing was left behind; "
            "free some space or choose another output folder"
        )


def sha256_of(path: Path, length: int | None = None) -> str:
    """What a file hashes to, or its first `length` bytes. Raises BundleError."""
    digest, left = hashlib.sha256(), length
    try:
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES if left is None else min(_HASH_CHUNK_BYTES, left)):
                digest.update(chunk)
                if left is not None:
                    left -= len(chunk)
    except OSError as err:
        raise BundleError(f"{path} cannot be read: {err.strerror}") from err
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
