"""Graphs for ONNX Runtime."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from export.backends.backend import Backend, LoweredGraph
from export.backends.tracing import converting, trace
from runtime.engines.onnxruntime import recording_options
from runtime.errors import ExportError

if TYPE_CHECKING:
    from export.graphs.graph import Graph
    from runtime.bundle import DelegateCoverage

OPSET = 20
WEIGHTS_FILE = "weights.onnx_data"
_LEAST_SHARED_BYTES = 1024  # smaller constants stay in the graph: shape inference may want to look at them
_ALIGNMENT_BYTES = 64


def lower(graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    """Writes `<name>.onnx` for each graph; their weights go into one file beside them, each tensor once.

    Raises ExportError when a shape is symbolic or an operator cannot be converted.
    """
    import onnx_ir
    import torch

    lowered = {}
    with _Weights(out_dir / WEIGHTS_FILE) as weights:
        for name, graph in graphs.items():
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
            shared = weights.move_out(made.model)
            onnx_ir.save(made.model, out_dir / f"{name}.onnx")
            lowered[name] = (f"{name}.onnx", (WEIGHTS_FILE,) if shared else ())
            del made, program, graph
    return {
        name: LoweredGraph(file=file, extra_files=extra, coverage=(coverage_of(out_dir / file),))
        for name, (file, extra) in lowered.items()
    }


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
    """A file of tensors that several graphs refer to; what has the same bytes lies there once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[bytes, int] = {}

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if not self._offsets:
            self.path.unlink()

    def move_out(self, model: Any) -> bool:
        """Replaces the large initializers of an `onnx_ir` model by references into the file; whether there were any."""
        import onnx_ir

        moved = False
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor.nbytes < _LEAST_SHARED_BYTES:
                continue
            data = tensor.tobytes()
            key = hashlib.sha256(data).digest()
            if key not in self._offsets:
                self._file.write(bytes(-self._file.tell() % _ALIGNMENT_BYTES))
                self._offsets[key] = self._file.tell()
                self._file.write(data)
            value.const_value = onnx_ir.ExternalTensor(
                self.path.name,
                self._offsets[key],
                len(data),
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
                base_dir=self.path.parent,
            )
            moved = True
        self._file.flush()
        return moved


def coverage_of(file: Path) -> DelegateCoverage:
    """Who runs the nodes of the file in ONNX Runtime's plain session, after its own graph optimisations."""
    import onnxruntime

    from runtime.bundle import DelegateCoverage

    options = recording_options(severity=3)
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
    quant_vision=(),
    quant_text=("none", "int4", "int4-g64", "int4-g128", "int8"),
    packages=("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
    lower=lower,
    one_by_one=True,
    open_axes=True,
)
