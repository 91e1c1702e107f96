"""The table of targets: which backends make graphs for a phone, and what each of them can be asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from runtime.ready_made import MULTIMODAL_RUNNER, TRANSFORMERS_JS

if TYPE_CHECKING:
    from export.checkpoints import Checkpoint
    from export.graphs.graph import Graph
    from export.graphs.vision import VisionEncoder
    from export.models.llava import ModelEntry
    from pruning import Arithmetic
    from runtime.bundle import DelegateCoverage, GraphInfo, TensorInfo

Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Soc:
    """A system-on-chip that graphs are compiled for, and what its NPU's compiler calls it."""

    name: str
    chip: str
    soc_model: int
    htp_arch: int


@cache
def socs() -> Mapping[str, Soc]:
    """The chips of `socs.json`, by the names they are sold under."""
    table = json.loads((Path(__file__).parent / "socs.json").read_text(encoding="utf-8"))
    return {name: Soc(name, **row) for name, row in table["socs"].items()}


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

    They come in the wanted precision and quantised.
    """

    def __call__(self, graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]: ...


class WriteReadyMade(Protocol):
    """Writes the graphs of cut 0 as somebody else's runtime expects them, with what else it needs."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        entry: ModelEntry,
        vision: VisionEncoder,
        folder: Path,
        *,
        quant_text: str | None,
        text_tokens: int,
    ) -> tuple[GraphInfo, ...]: ...


@dataclass(frozen=True)
class ReadyMade:
    """A runtime of other people and what can be written for it; the first scheme for its text graphs is the default."""

    runtime: str
    quant_text: tuple[str, ...]
    load: Callable[[], WriteReadyMade]


@dataclass(frozen=True)
class Backend:
    """A converter together with the engine that runs what it makes; the first precision is the default.

    So is the first scheme for the text graphs, which may be `none`; the vision graph is quantised on request. A
    quantised graph computes the rest in fp32, whatever the precision. `packages` are the modules without which nothing
    can be exported. Where a backend `compresses`, it applies its schemes by itself: what they leave out computes in the
    precision all the same. Where it `calibrates`, that of the vision graph needs photos.
    """

    name: str
    engine: Literal["coreml", "executorch", "onnxruntime"]
    precisions: tuple[Precision, ...]
    quant_vision: tuple[str, ...]
    quant_text: tuple[str, ...]
    pruner_arithmetic: Arithmetic
    packages: tuple[str, ...]
    load: Callable[[], Lower]
    # The runtime of other people that graphs of cut 0 can be laid out for.
    ready_made: ReadyMade | None = None
    compresses: bool = False
    calibrates: bool = False
    # Whether its engine keeps the KV cache between runs, in float16: graphs of fp16 leave it there.
    states: bool = False
    # For a converter that goes down to the precision itself: what the graphs come to it in.
    traced_precision: Precision | None = None
    # Where graphs are compiled for one chip: `for_soc` must be asked for the backend that knows it.
    load_for_soc: Callable[[Soc], Lower] | None = None
    # For iOS alone: the version from which on it runs what is made, and the same backend for the version before.
    min_ios: int | None = None
    earlier: Backend | None = None
    # How often the weights of the text graphs are stored.
    text_copies: int = 1
    # How much more memory an export takes than with the other backends.
    ram_factor: float = 1.0
    # What one graph's file can hold, in bytes; None: anything.
    most_graph_bytes: int | None = None

    def for_soc(self, soc: Soc) -> Backend:
        """This backend as it makes graphs for one chip."""
        assert self.load_for_soc is not None
        return replace(self, load=partial(self.load_for_soc, soc))

    def __post_init__(self) -> None:
        if not self.precisions:
            raise ValueError(f"backend {self.name!r} must offer at least one precision")


@dataclass(frozen=True)
class Target:
    """A kind of phone; the first backend is the default."""

    name: str
    backends: tuple[Backend, ...]

    def __post_init__(self) -> None:
        if not self.backends:
            raise ValueError(f"target {self.name!r} must have at least one backend")


def _executorch() -> Lower:
    from export.backends.executorch import lower

    return lower


def _vulkan() -> Lower:
    from export.backends.executorch import VULKAN, lower

    return partial(lower, delegate=VULKAN)


def _onnx() -> Lower:
    from export.backends.onnx import lower

    return lower


def _core_ml_delegate() -> Lower:
    from export.backends.executorch import lower_to_core_ml

    return lower_to_core_ml


def _coreml(min_ios: int) -> Lower:
    from export.backends.coreml import lower

    return partial(lower, min_ios=min_ios)


def _qnn(soc: Soc) -> Lower:
    from export.backends.qnn import lower

    return partial(lower, soc)


def _webgpu() -> Lower:
    from export.backends.webgpu import lower

    return lower


def _nnapi() -> Lower:
    from export.backends.nnapi import lower

    return lower


def _no_soc() -> Lower:
    raise AssertionError("graphs for an NPU are compiled for one chip: ask for_soc")


def _runner() -> WriteReadyMade:
    from export.backends.executorch_runner import write_for_runner

    return write_for_runner


def _transformers_js() -> WriteReadyMade:
    from export.backends.transformers_js import write_transformers_js

    return write_transformers_js


XNNPACK = Backend(
    name="xnnpack",
    engine="executorch",
    # Phones since Armv8.2 add float16 products up in 16 bits, which costs tokens (docs/precision.md); in fp32 every
    # processor gives the same, from a file of the same size.
    precisions=("fp32", "fp16"),
    quant_vision=("8da8w",),
    quant_text=("8da4w", "8da4w-g64", "8da4w-g32", "8da8w"),
    pruner_arithmetic="float32",
    packages=("torch", "transformers", "executorch", "torchao"),
    load=_executorch,
    ready_made=ReadyMade(MULTIMODAL_RUNNER, ("8da4w", "8da4w-g64", "8da4w-g32", "8da8w"), _runner),
)
VULKAN = Backend(
    name="vulkan",
    engine="executorch",
    precisions=("fp32", "fp16"),
    quant_vision=(),
    quant_text=(),
    pruner_arithmetic="float32",
    packages=("torch", "transformers", "executorch"),
    load=_vulkan,
)
ONNX = Backend(
    name="onnx",
    engine="onnxruntime",
    precisions=("fp32", "fp16"),
    quant_vision=(),
    quant_text=("none", "int4", "int4-g64", "int4-g128", "int8"),
    pruner_arithmetic="float32",
    packages=("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
    load=_onnx,
    # It names 4-bit weights; what it calls int8 and q8 is another format, which also rounds activations.
    ready_made=ReadyMade(TRANSFORMERS_JS, ("none", "int4", "int4-g64", "int4-g128"), _transformers_js),
)
COREML = Backend(
    name="coreml",
    engine="coreml",
    # The Neural Engine computes in fp16 alone.
    precisions=("fp16", "fp32"),
    quant_vision=("int8", "int4", "pal4"),
    quant_text=("int4", "int8", "pal4"),
    pruner_arithmetic="float32",
    packages=("torch", "transformers", "coremltools"),
    load=partial(_coreml, 18),
    compresses=True,
    states=True,
    min_ios=18,
    # iOS 17 knows no states, no scales or palettes for blocks of weights, and no packages of several functions, so that
    # the three graphs over the decoder's layers hold their weights each.
    earlier=Backend(
        name="coreml",
        engine="coreml",
        precisions=("fp16", "fp32"),
        quant_vision=("int8",),
        quant_text=("int8",),
        pruner_arithmetic="float32",
        packages=("torch", "transformers", "coremltools"),
        load=partial(_coreml, 17),
        compresses=True,
        min_ios=17,
        text_copies=3,
    ),
)

COREML_DELEGATE = Backend(
    name="executorch",
    engine="executorch",
    precisions=("fp16", "fp32"),
    quant_vision=(),
    quant_text=(),
    pruner_arithmetic="float32",
    packages=("torch", "transformers", "executorch", "coremltools"),
    load=_core_ml_delegate,
    min_ios=18,
    text_copies=3,
    # Packages lie in memory until the program is written, and once more when they are taken out of it: the vision graph
    # of llava-1.5-7b took 8.9 GiB.
    ram_factor=1.8,
)

QNN = Backend(
    name="qnn",
    engine="onnxruntime",
    precisions=("fp16",),
    quant_vision=("a16w8",),
    quant_text=(),
    # float16 cannot hold the 2^60 that the default form compares with.
    pruner_arithmetic="float16",
    packages=("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime_qnn"),
    load=_no_soc,
    compresses=True,
    calibrates=True,
    traced_precision="fp32",
    load_for_soc=_qnn,
)

WEBGPU = Backend(
    name="webgpu",
    engine="onnxruntime",
    # What a software GPU computes in, too: an fp16 graph could not be checked without hardware.
    precisions=("fp32",),
    quant_vision=(),
    quant_text=("none", "int4", "int4-g64", "int4-g128", "int8"),
    pruner_arithmetic="float32",
    packages=("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime_ep_webgpu"),
    load=_webgpu,
)

NNAPI = Backend(
    name="nnapi",
    engine="onnxruntime",
    # ONNX Runtime's NNAPI delegate takes no float16 tensors.
    precisions=("fp32",),
    quant_vision=(),
    quant_text=(),
    pruner_arithmetic="float32",
    packages=("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
    load=_nnapi,
    # A .ort file is a flatbuffer with the weights inside, whose offsets end there.
    most_graph_bytes=2**31 - 1,
)

TARGETS: dict[str, Target] = {
    "android": Target(name="android", backends=(XNNPACK, VULKAN, ONNX, WEBGPU, NNAPI, QNN)),
    "ios": Target(name="ios", backends=(COREML, COREML_DELEGATE)),
}
