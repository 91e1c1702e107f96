"""Runs .onnx and .ort graphs through ONNX Runtime: on the CPU, or on the delegate that the manifest promises."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import GraphInfo, TensorInfo
from runtime.engines import qnn, webgpu
from runtime.errors import EngineError, EngineMissingError
from runtime.memory import give_back
from runtime.placement import Placement

CPU = "CPUExecutionProvider"
NNAPI = "NnapiExecutionProvider"
_NO_NNAPI = (
    "NNAPI exists on Android alone: here ONNX Runtime's CPU ran the same file in its place, and what NNAPI would take "
    "is told by a list, not measured"
)
DTYPE_BY_ONNX_TYPE = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def load(graph: GraphInfo, file: Path, extra_files: tuple[Path, ...], threads: int) -> LoadedSession:
    """Opens a graph and holds its inputs and outputs against the manifest. Raises EngineError.

    External weights are found by ONNX Runtime itself, beside the graph; `extra_files` were checked by the caller.
    """
    del extra_files
    try:
        import onnxruntime
    except ImportError as err:
        raise EngineMissingError(
            f"the ONNX Runtime engine is not installed ({err}); pip install 'pruneport[onnx]'"
        ) from err
    options = recording_options(severity=3)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # An arena keeps what activations took, in ever larger pieces: as much again as a tower in 8 bits.
    options.enable_cpu_mem_arena = False
    engine = f"onnxruntime {onnxruntime.__version__}"
    try:
        promised = {coverage.delegate for coverage in graph.coverage}
        if qnn.QNN in promised:
            session = qnn.open_on_htp(file, options)
            engine += f" ({qnn.describe()})"
        elif webgpu.WEBGPU in promised:
            whole = all(coverage.outside_nodes == 0 for coverage in graph.coverage)
            session = webgpu.open_on_gpu(file, options, whole=whole)
            engine += f" ({webgpu.describe()})"
        else:
            session = onnxruntime.InferenceSession(str(file), options, providers=[CPU])
            engine += " (on the CPU in the place of NNAPI)" if NNAPI in promised else ""
    except EngineError:
        raise
    # The bindings raise a family of classes derived from Exception alone, one per status code.
    except Exception as err:
        raise EngineError(f"ONNX Runtime cannot load {file}: {err}; export again") from err
    _check_interface(graph.inputs, session.get_inputs(), "inputs", file)
    _check_interface(graph.outputs, session.get_outputs(), "outputs", file)
    return LoadedSession(engine, session, graph, file)


class LoadedSession:
    """One graph, ready to run."""

    def __init__(self, engine: str, session: Any, graph: GraphInfo, file: Path) -> None:
        self.engine = engine
        self._session = session
        self._inputs = [info.name for info in graph.inputs]
        self._outputs = [info.name for info in graph.outputs]
        self._file = file
        self._stand_in = _NO_NNAPI if any(coverage.delegate == NNAPI for coverage in graph.coverage) else ""

    @property
    def threads(self) -> int:
        return int(self._session.get_session_options().intra_op_num_threads)

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        try:
            return list(self._session.run(self._outputs, dict(zip(self._inputs, inputs, strict=True))))
        except Exception as err:
            raise EngineError(f"ONNX Runtime failed in {self._file}: {err}") from err

    def placement(self) -> Placement:
        _, outside = assigned(self._session)
        delegates: Counter[str] = Counter()
        for subgraph in self._session.get_provider_graph_assignment_info():
            if subgraph.ep_name == webgpu.WEBGPU:  # takes nodes one by one, each a part of its own
                delegates[webgpu.WEBGPU] = 1
            elif subgraph.ep_name != CPU:
                delegates[subgraph.ep_name] += 1
        return Placement(
            delegates=dict(delegates),
            outside=dict(outside.most_common()),
            # None is recorded for .ort files; such a session is opened with the CPU alone.
            source="the session's one provider" if self._stand_in else "ONNX Runtime's node assignment",
            stand_in=self._stand_in,
            emulated=(qnn.QNN in delegates and qnn.emulated()) or (webgpu.WEBGPU in delegates and webgpu.emulated()),
        )

    def close(self) -> None:
        self._session = None
        give_back()


def recording_options(*, severity: int) -> Any:
    """SessionOptions of sessions that record who runs which node, and log what is at least as severe (0 to 4)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = severity
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def assigned(session: Any) -> tuple[Counter[str], Counter[str]]:
    """Nodes of an InferenceSession that recorded its assignment: by delegate, and those on the CPU by operator."""
    delegates: Counter[str] = Counter()
    outside: Counter[str] = Counter()
    for subgraph in session.get_provider_graph_assignment_info():
        kinds = [node.op_type for node in subgraph.get_nodes()]
        if subgraph.ep_name == CPU:
            outside.update(kinds)
        else:
            delegates[subgraph.ep_name] += len(kinds)
    return delegates, outside


def _check_interface(declared: tuple[TensorInfo, ...], found: list[Any], kind: str, file: Path) -> None:
    have = {node.name: (DTYPE_BY_ONNX_TYPE.get(node.type, node.type), tuple(node.shape)) for node in found}
    if have.keys() != {info.name for info in declared} or not all(info.fits(*have[info.name]) for info in declared):
        shown = ", ".join(f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in have.items())
        wanted = ", ".join(map(str, declared))
        raise EngineError(f"{file} has the {kind} {shown}; its manifest says {wanted}; export again")
