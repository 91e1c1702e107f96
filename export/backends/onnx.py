"""Graphs for ONNX Runtime."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from export.backends.backend import Backend, LoweredGraph
from export.backends.tracing import converting, trace
from export.stages import graph_stage
from runtime.bundle import FileInfo, TensorInfo
from runtime.engines.onnxruntime import recording_options
from runtime.errors import ExportError

if TYPE_CHECKING:
    import torch

    from export.graphs.graph import Graph
    from export.stages import Stages
    from export.weights import Waiting
    from runtime.bundle import DelegateCoverage

OPSET = 20
WEIGHTS_FILE = "weights.onnx_data"
_LEAST_SHARED_BYTES = 1024  # smaller constants stay in the graph: shape inference may want to look at them
_ALIGNMENT_BYTES = 64


def lower(graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    """Writes `<name>.onnx` for each graph; their weights go into one file beside them, each tensor once.

    Raises ExportError when a shape is symbolic or an operator cannot be converted.
    """
    return lower_on(graphs, out_dir, None)


class _Written(msgspec.Struct, frozen=True):
    """A graph that is written: its inputs and outputs, whether it has weights in their file, and where all lie there.

    `offsets` are those of all graphs up to it, by the sha256 of a tensor's bytes.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    shared: bool
    offsets: dict[str, int]


def lower_on(graphs: Mapping[str, Graph], out_dir: Path, stages: Stages | None) -> dict[str, LoweredGraph]:
    """Does what `lower` does, but keeps the graphs that `stages` has from an interrupted run."""
    import onnx_ir
    import torch

    from export.weights import Waiting

    made_before: dict[str, _Written] = {}
    for name in graphs:
        kept = None if stages is None else stages.kept(graph_stage(name), _Written)
        if kept is None:
            break
        made_before[name] = kept
    last = next(reversed(made_before.values()), None)
    lowered: dict[str, _Written] = dict(made_before)
    waiting = Waiting()
    with _Weights(out_dir / WEIGHTS_FILE, last.offsets if last else {}, waiting) as weights:
        for name in graphs:
            if name in made_before:
                continue
            graph = graphs[name]
            waiting.expect(graph)
            program = trace(graph)
            with (
                warnings.catch_warnings(),
                quiet("torch.onnx", "onnxscript", "onnx_ir"),
                converting("the ONNX exporter", {name: program}),
            ):
                warnings.simplefilter("ignore")  # deprecations inside the converter, which nobody here can act on
                made = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=OPSET,
                    input_names=list(graph.input_names),
                    output_names=list(graph.output_names),
                    # Folding took minutes on the pruner's graph and made it no faster: ONNX Runtime folds too.
                    optimize=False,
                    verbose=False,
                )
            if made is None:
                raise ExportError(f"the ONNX exporter returned nothing for {name}; run again with -v to see why")
            _plain_bounds(made.model)
            leave_out_traces(made.model)
            shared = weights.move_out(made.model)
            onnx_ir.save(made.model, out_dir / f"{name}.onnx")
            lowered[name] = _Written(graph.input_infos(), graph.output_infos(), shared, dict(weights.offsets))
            if stages is not None:
                stages.finished(graph_stage(name), lowered[name], weights.so_far())
            del made, program, graph
    return {
        name: LoweredGraph(
            file=f"{name}.onnx",
            extra_files=(WEIGHTS_FILE,) if written.shared else (),
            coverage=(coverage_of(out_dir / f"{name}.onnx"),),
            inputs=written.inputs,
            outputs=written.outputs,
        )
        for name, written in lowered.items()
    }


def leave_out_traces(model: Any) -> None:
    """Takes out of an `onnx_ir` model what the exporter wrote of where it ran: lines and paths of its code."""
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)


def _plain_bounds(model: Any) -> None:
    """Lets each Clip of an `onnx_ir` model have its bounds as constants, as compilers of NPUs ask for.

    The exporter casts them to the input's type, also where they are of that type already.
    """
    for node in model.graph:
        if node.op_type != "Clip":
            continue
        for place, bound in enumerate(node.inputs[1:], start=1):
            cast = None if bound is None else bound.producer()
            if cast is None or cast.op_type != "CastLike":
                continue
            constant = cast.inputs[0].producer()
            if constant is not None and constant.attributes["value"].as_tensor().dtype == node.inputs[0].dtype:
                node.replace_input_with(place, cast.inputs[0])


class _Weights:
    """A file of tensors that several graphs refer to; what has the same bytes lies there once.

    `offsets` says where by the sha256 of these bytes; given what is there already, the file is added to. Weights of
    `waiting` are read as they are written, one at a time, and none again for another graph.
    """

    def __init__(self, path: Path, offsets: Mapping[str, int], waiting: Waiting) -> None:
        self.path = path
        self.offsets = dict(offsets)
        self._waiting = waiting
        # Of weights that waited the sha256, by their keys, and of those that stay in the graphs the numbers.
        self._known: dict[tuple[str, ...], str] = {}
        self._small: dict[tuple[str, ...], Any] = {}
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> Self:
        self._file = self.path.open("r+b" if self.offsets else "wb")
        while self.offsets and (chunk := self._file.read(2**22)):
            self._sha256.update(chunk)
        return self

    def so_far(self) -> dict[Path, FileInfo]:
        """What the file hashes to as it is now; nothing while it is empty."""
        size = self._file.tell()
        return {self.path: FileInfo(sha256=self._sha256.hexdigest(), size_bytes=size)} if size else {}

    def _add(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self.offsets:
            self.path.unlink()

    def move_out(self, model: Any) -> bool:
        """Replaces the large initializers of an `onnx_ir` model by references into the file; whether there were any.

        CheckpointError where a weight cannot be read.
        """
        import onnx_ir

        moved = False
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes < _LEAST_SHARED_BYTES:
                value.const_value = self._here(tensor)
                continue
            value.const_value = onnx_ir.ExternalTensor(
                self.path.name,
                self.offsets[self._stored(tensor)],
                tensor.nbytes,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=self.path.parent,
            )
            moved = True
        self._waiting.forget()
        self._file.flush()
        return moved

    def _here(self, tensor: Any) -> Any:
        """A tensor that stays in the graph, read if it waits."""
        import onnx_ir

        raw = _of_torch(tensor)
        weight = None if raw is None else self._waiting.key(raw)
        if raw is None or weight is None:
            return tensor
        if weight not in self._small:
            self._small[weight] = self._waiting.numbers(raw).numpy(force=True).copy()
        return onnx_ir.tensor(self._small[weight], name=tensor.name)

    def _stored(self, tensor: Any) -> str:
        """Adds the bytes of a tensor to the file if they are not in there; their sha256."""
        raw = _of_torch(tensor)
        weight = None if raw is None else self._waiting.key(raw)
        if weight in self._known:
            return self._known[weight]
        data = tensor.tobytes() if raw is None else _bytes(self._waiting.numbers(raw))
        key = hashlib.sha256(data).hexdigest()
        if key not in self.offsets:
            self._add(bytes(-self._file.tell() % _ALIGNMENT_BYTES))
            self.offsets[key] = self._file.tell()
            self._add(data)
        if weight is not None:
            self._known[weight] = key
        return key


def _of_torch(tensor: Any) -> torch.Tensor | None:
    """What the exporter made an `onnx_ir` tensor of, where that is a tensor of torch, such as a program's weight."""
    import torch

    raw = getattr(tensor, "raw", None)
    return raw if isinstance(raw, torch.Tensor) else None


def _bytes(tensor: torch.Tensor) -> memoryview:
    """What a tensor is made of, without a copy; ONNX, as torch on all it runs on here, has the least byte first."""
    import torch

    of_bytes: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(of_bytes)


def read_when_written(model: Any, waiting: Waiting) -> None:
    """Lets the initializers of an `onnx_ir` model that wait in their checkpoint be read whenever somebody writes them.

    For who writes files by `onnx_ir` itself, which keeps none of them.
    """
    import onnx_ir

    for value in model.graph.initializers.values():
        tensor = value.const_value
        raw = _of_torch(tensor)
        if raw is not None and waiting.key(raw) is not None:
            value.const_value = onnx_ir.LazyTensor(
                partial(_read, raw, waiting), dtype=tensor.dtype, shape=tensor.shape, name=tensor.name
            )


def _read(raw: torch.Tensor, waiting: Waiting) -> Any:
    import onnx_ir

    return onnx_ir.tensor(waiting.numbers(raw).numpy(force=True))


def coverage_of(file: Path) -> DelegateCoverage:
    """Who runs the nodes of the file in ONNX Runtime's plain session, after its own graph optimisations."""
    import onnxruntime

    from runtime.bundle import DelegateCoverage

    options = recording_options(severity=3)
    # Nothing is run: packing would take as much memory again as the weights.
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    nodes = sum(len(part.get_nodes()) for part in session.get_provider_graph_assignment_info())
    return DelegateCoverage(delegate="CPUExecutionProvider", partitions=1, nodes=nodes)


class quiet:
    """Silences loggers for a while; errors still pass."""

    def __init__(self, *names: str) -> None:
        self._loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self._levels = [logger.level for logger in self._loggers]
        for logger in self._loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.setLevel(level)


ONNX = Backend(
    name="onnx",
    engine="onnxruntime",
    precisions=("fp32", "fp16"),
    quant_vision=("int8",),
    quant_text=("int4-g128", "int4-g64", "int4", "int8"),
    quant_vision_with_text="int8",
    quant_rows="int8",
    packages=("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
    lower=lower,
    lower_on=lower_on,
    one_by_one=True,
    open_axes=True,
    reads_late=True,
)
