"""Graphs for ONNX Runtime."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from export.backends.tracing import trace
from export.targets import LoweredGraph, Precision
from runtime.errors import ExportError

if TYPE_CHECKING:
    import torch

    from runtime.bundle import DelegateCoverage

OPSET = 20
_INLINE_LIMIT_BYTES = 256 * 2**20  # beyond this the weights go into a file of their own; protobuf ends at 2 GiB


def lower(
    module: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    out_dir: Path,
    graph_name: str,
    *,
    precision: Precision,
    quant_vision: str | None,
) -> LoweredGraph:
    """Writes `graph_name`.onnx, with its weights in `graph_name`.onnx.data when they are large.

    `module` comes in the wanted precision already. Raises ExportError when a shape is symbolic.
    """
    import torch

    del precision
    if quant_vision is not None:
        raise ExportError(f"quant_vision={quant_vision!r} is not offered by this backend; leave --quant-vision out")
    weights_bytes = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    external = weights_bytes > _INLINE_LIMIT_BYTES
    file = f"{graph_name}.onnx"
    inputs, outputs = getattr(module, "input_names", None), getattr(module, "output_names", None)
    with warnings.catch_warnings(), _quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")  # deprecations inside the converter, which nobody here can act on
        made = torch.onnx.export(
            trace(module, example_inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs) if inputs else None,
            output_names=list(outputs) if outputs else None,
            optimize=False,  # folding took minutes on the pruner's graph and made it no faster: ONNX Runtime folds too
            verbose=False,
        )
        if made is None:
            raise ExportError(f"the ONNX exporter returned nothing for {graph_name}; run again with -v to see why")
        made.save(str(out_dir / file), external_data=external)
    extra = tuple(sorted(path.name for path in out_dir.glob(f"{file}.*")))
    return LoweredGraph(file=file, extra_files=extra, coverage=(_coverage(out_dir / file),))


def _coverage(file: Path) -> DelegateCoverage:
    """Who runs the nodes of the file in ONNX Runtime's plain session, after its own graph optimisations."""
    import onnxruntime

    from runtime.bundle import DelegateCoverage

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    nodes = sum(len(part.get_nodes()) for part in session.get_provider_graph_assignment_info())
    return DelegateCoverage(delegate="CPUExecutionProvider", partitions=1, nodes=nodes)


class _quiet:
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
