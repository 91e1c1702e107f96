"""Graphs for the Snapdragon NPU: compiled ahead for one chip, opened by ONNX Runtime's QNN delegate."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from export.backends import onnx
from export.backends.backend import Backend, LoweredGraph, Variants
from runtime.engines import qnn
from runtime.engines.onnxruntime import assigned, recording_options
from runtime.errors import ExportError

if TYPE_CHECKING:
    from export.graphs.graph import Graph
    from runtime.bundle import DelegateCoverage


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


def _by_soc() -> Mapping[str, Backend]:
    """The backend for each chip."""
    return {
        name: replace(
            QNN,
            lower=partial(lower, soc),
            variants=None,
            variant=name,
            soc=name,
            made_for=f"{name} ({soc.chip}, HTP v{soc.htp_arch}) alone",
        )
        for name, soc in socs().items()
    }


def _no_soc(graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    raise AssertionError("graphs for an NPU are compiled for one chip: take a variant")


def lower(soc: Soc, graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    """Writes `<name>.onnx`, one node that stands for the graph, and `<name>_qnn.bin`, the chip's program for it.

    The program holds its own weights, in float16, which is what the HTP computes in beside integers. A graph with a
    `compression` is quantised before (export.backends.qdq).

    Raises ExportError when a shape is symbolic or when the NPU's compiler leaves a node to the CPU.
    """
    from export.backends import qdq
    from export.blocks.norms import Norm

    for graph in graphs.values():
        for module in graph.modules():
            if isinstance(module, Norm):
                module.squares_in_half = True
    lowered = {}
    # Inside the output's folder, which has room for it: the ONNX graphs are only a step on the way.
    with tempfile.TemporaryDirectory(dir=out_dir, prefix="onnx-") as folder:
        for name, written in onnx.lower(graphs, Path(folder)).items():
            file = f"{name}.onnx"
            source = Path(folder) / written.file
            if graphs[name].compression:
                source = Path(folder, "quantised", file)
                source.parent.mkdir()
                qdq.quantise(graphs[name], Path(folder) / written.file, source)
            coverage = compile_for(soc, source, out_dir / file)
            lowered[name] = LoweredGraph(file=file, extra_files=(f"{name}_qnn.bin",), coverage=(coverage,))
    return lowered


def compile_for(soc: Soc, source: Path, target: Path) -> DelegateCoverage:
    """Compiles an ONNX graph into `target` and a program beside it; says how many nodes the NPU took: all of them."""
    from runtime.bundle import DelegateCoverage

    settings = {"soc_model": str(soc.soc_model), "htp_arch": str(soc.htp_arch)}
    options = recording_options(severity=4)
    options.add_session_config_entry("ep.context_enable", "1")
    options.add_session_config_entry("ep.context_embed_mode", "0")
    options.add_session_config_entry("ep.context_file_path", str(target))
    try:
        session = qnn.open_on_htp(source, options, settings)
    # The bindings raise a family of classes derived from Exception alone, one per status code.
    except Exception as error:
        left = _left_to_the_cpu(source, settings)
        why = f"it leaves {left} to the CPU" if left else str(error)
        raise ExportError(
            f"the compiler of the Snapdragon NPU cannot take {source.stem} whole for {soc.chip}: {why}; "
            "choose another --backend, and please report this"
        ) from error
    parts = session.get_provider_graph_assignment_info()
    taken = [len(part.get_nodes()) for part in parts if part.ep_name == qnn.QNN]
    return DelegateCoverage(delegate=qnn.QNN, partitions=len(taken), nodes=sum(taken))


def _left_to_the_cpu(source: Path, settings: Mapping[str, str]) -> str:
    """Which operators the NPU's compiler refuses, and how often; nothing where that is not what went wrong."""
    import onnxruntime

    options = recording_options(severity=4)
    try:
        qnn.add_to(options, settings)
        session = onnxruntime.InferenceSession(str(source), options)
    except Exception:  # noqa: BLE001 - whatever it was, the caller's own error says it
        return ""
    _, refused = assigned(session)
    return ", ".join(f"{count} {op}" for op, count in refused.most_common())


QNN = Backend(
    name="qnn",
    engine="onnxruntime",
    precisions=("fp16",),
    quant_vision=("a16w8",),
    quant_text=(),
    packages=("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "onnxruntime_qnn"),
    lower=_no_soc,
    # float16 cannot hold the 2^60 that the default form compares with.
    pruner_arithmetic="float16",
    compresses=True,
    calibrates=True,
    traced_precision="fp32",
    # The whole numbers of float16 are exact up to here.
    most_positions=2048,
    variants=Variants("soc", _by_soc, why="compiles for one chip"),
)
