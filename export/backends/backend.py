"""What a backend is: a converter with its engine, what it can be asked for, and the recipe of each part it makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from export.graphs.graph import Graph
    from export.stages import Stages
    from pruning import Arithmetic
    from runtime.bundle import DelegateCoverage, TensorInfo

Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class LoweredGraph:
    """One graph as a backend wrote it: file names relative to the output folder, and who executes its nodes.

    `inputs` and `outputs` are what the file has, where that is not what the graph says.
    """

    file: str
    extra_files: tuple[str, ...]
    coverage: tuple[DelegateCoverage, ...]
    inputs: tuple[TensorInfo, ...] | None = None
    outputs: tuple[TensorInfo, ...] | None = None
    states: tuple[TensorInfo, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.file, *self.extra_files):
            inside = name.removeprefix(f"{self.file}/")  # of a package, which is a folder
            if not name or ".." in Path(name).parts or (Path(name).name != name and inside == name):
                raise ValueError(f"a lowered graph's file must be a bare name in the output folder, got {name!r}")


class Lower(Protocol):
    """Traces graphs with static shapes, lowers them and writes them into `out_dir`, weights that they share only once.

    They come in the precision of their recipe, and quantised where the backend does not do that itself. Their weights
    may be read only when a backend comes to them: see `Backend.one_by_one`.
    """

    def __call__(self, graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]: ...


class LowerOn(Protocol):
    """Does what `Lower` does, but makes no graph again that `stages` kept, and notes each one that it finishes."""

    def __call__(self, graphs: Mapping[str, Graph], out_dir: Path, stages: Stages) -> dict[str, LoweredGraph]: ...


@dataclass(frozen=True)
class Recipe:
    """How one part of a model, vision or text, is made, by which backend.

    `precision` is what was asked for, and what graphs without a scheme compute in. `traced` is the precision that its
    graphs are built and handed over in, `computes` the one that they end up in.
    `scheme` quantises its linear layers, None for none; `packed` says who does it: "before tracing" quantises the
    modules, and what is left computes in float32; "while lowering" is up to the backend.
    """

    backend: Backend
    precision: Precision
    computes: Precision
    traced: Precision
    scheme: str | None
    packed: Literal["before tracing", "while lowering"]

    @property
    def module_scheme(self) -> str | None:
        """The scheme to quantise modules with before they are traced."""
        return self.scheme if self.packed == "before tracing" else None

    @property
    def backend_scheme(self) -> str | None:
        """The scheme that the backend applies while it lowers."""
        return self.scheme if self.packed == "while lowering" else None

    @property
    def in_half(self) -> bool:
        """True where numbers between operators are float16."""
        return self.computes == "fp16"

    @property
    def unquantised(self) -> Recipe:
        """The same without a scheme."""
        return self.backend.recipe(self.precision, None)

    @property
    def arithmetic(self) -> str:
        """What decides how near to the desktop the part comes: its scheme, or else its precision."""
        return self.scheme or self.computes


@dataclass(frozen=True)
class Variants:
    """What graphs of one backend are made for one of: chips, or versions of the phone's system.

    `flag` is the field of a request that names one, `default` the one that is taken without it; None means that one
    must be named, and `why` then says what for.
    """

    flag: Literal["soc", "min_ios"]
    known: Callable[[], Mapping[str, Backend]]
    default: str | None = None
    why: str = ""


@dataclass(frozen=True)
class Backend:
    """A converter together with the engine that runs what it makes; the first precision is the default.

    So is the first scheme for the text graphs, which may be `none`; the vision graph is quantised on request.
    `packages` are the modules without which nothing can be exported. Where a backend `compresses`, it applies its
    schemes by itself: what they leave out computes in the precision all the same. Elsewhere it computes in fp32. Where
    it `calibrates`, the scheme of the vision graph needs photos.
    """

    name: str
    engine: Literal["coreml", "executorch", "onnxruntime"]
    precisions: tuple[Precision, ...]
    quant_vision: tuple[str, ...]
    quant_text: tuple[str, ...]
    packages: tuple[str, ...]
    lower: Lower
    # What its engine can compute the choice of tokens in.
    pruner_arithmetic: Arithmetic = "float32"
    # True where `lower` goes through the graphs once, in their order, and keeps none: then only the weights of the part
    # that it is at have to be in memory.
    one_by_one: bool = False
    # What is called instead of `lower` where graphs that an interrupted run finished need not be made again.
    lower_on: LowerOn | None = None
    # True where its engine takes graphs of any number of tokens; elsewhere each number has a graph of its own.
    open_axes: bool = False
    # True where it reads a weight when it writes it: then graphs come to it with stand-ins (see export.weights.Late).
    reads_late: bool = False
    # Where the text graphs are quantised, what else is: the vision graph if nobody says otherwise, and the rows of the
    # token embedding.
    quant_vision_with_text: str | None = None
    quant_rows: str | None = None
    compresses: bool = False
    calibrates: bool = False
    # Whether its engine keeps the KV cache between runs, in float16: graphs of fp16 leave it there.
    states: bool = False
    # For a converter that goes down to the precision itself: what the graphs come to it in.
    traced_precision: Precision | None = None
    # How often the weights of the text graphs are stored.
    text_copies: int = 1
    # How much more memory an export takes than with the other backends.
    ram_factor: float = 1.0
    # What one graph's file can hold, in bytes; None: anything.
    most_graph_bytes: int | None = None
    # The largest whole number up to which its engine counts positions exactly; None: any that occurs.
    most_positions: int | None = None
    # What can be chosen, and in a variant what was: how a bundle's name and a plan call it.
    variants: Variants | None = None
    variant: str = ""
    made_for: str = ""
    soc: str | None = None
    min_os: str | None = None

    def __post_init__(self) -> None:
        if not self.precisions:
            raise ValueError(f"backend {self.name!r} must offer at least one precision")

    def recipe(self, precision: Precision, scheme: str | None) -> Recipe:
        """How a part is made that was asked for in a precision and with a scheme."""
        if scheme is not None and not self.compresses:
            return Recipe(self, precision, computes="fp32", traced="fp32", scheme=scheme, packed="before tracing")
        traced = self.traced_precision or precision
        return Recipe(self, precision, computes=precision, traced=traced, scheme=scheme, packed="while lowering")
