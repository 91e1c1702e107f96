"""Graphs for a GPU: ONNX files as they are, opened by ONNX Runtime's WebGPU delegate, which says what it takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from export.backends import onnx
from export.backends.backend import Backend, LoweredGraph
from runtime.engines import webgpu
from runtime.engines.onnxruntime import assigned, recording_options
from runtime.errors import EngineError, ExportError

if TYPE_CHECKING:
    from export.graphs.graph import Graph
    from runtime.bundle import DelegateCoverage

LEFT = "WebGPU has no kernel for it in this data type, or keeps what computes shapes on the CPU"


def lower(graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    """Writes what the ONNX backend writes and asks the delegate which nodes it takes.

    Raises ExportError when a shape is symbolic, EngineMissingError where there is no adapter to ask.
    """
    return {
        name: replace(written, coverage=(coverage_of(out_dir / written.file),))
        for name, written in onnx.lower(graphs, out_dir).items()
    }


def coverage_of(file: Path) -> DelegateCoverage:
    """Who runs the nodes of the file, as optimised; what the CPU is left with, by operator."""
    from runtime.bundle import DelegateCoverage, OutsideOp

    try:
        session = webgpu.open_on_gpu(file, recording_options(severity=4), whole=False)
    except EngineError:
        raise
    # The bindings raise a family of classes derived from Exception alone, one per status code.
    except Exception as error:
        raise ExportError(f"WebGPU cannot take {file.stem}: {error}; choose another --backend") from error
    taken, outside = assigned(session)
    nodes = taken[webgpu.WEBGPU]
    return DelegateCoverage(
        delegate=webgpu.WEBGPU,
        partitions=min(nodes, 1),
        nodes=nodes,
        outside=tuple(OutsideOp(op=op, count=count, reason=LEFT) for op, count in outside.most_common()),
    )


WEBGPU = Backend(
    name="webgpu",
    engine="onnxruntime",
    # What a software GPU computes in, too: an fp16 graph could not be checked without hardware.
    precisions=("fp32",),
    quant_vision=(),
    quant_text=("none", "int4", "int4-g64", "int4-g128", "int8"),
    packages=("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime_ep_webgpu"),
    lower=lower,
)
