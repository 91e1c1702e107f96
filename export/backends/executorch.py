"""Graphs for ExecuTorch, lowered to XNNPACK."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends.tracing import trace
from export.targets import LoweredGraph, Precision
from runtime.errors import ExportError

if TYPE_CHECKING:
    import torch

    from runtime.bundle import DelegateCoverage


def lower(
    module: torch.nn.Module,
    example_inputs: tuple[torch.Tensor, ...],
    out_dir: Path,
    graph_name: str,
    *,
    precision: Precision,
    quant_vision: str | None,
) -> LoweredGraph:
    """Writes `graph_name`.pte with everything that XNNPACK takes lowered to it.

    `module` comes in the wanted precision already and is quantised in place. Raises ExportError when a shape is
    symbolic or the converter refuses the graph.
    """
    del precision
    with warnings.catch_warnings(), _rejections() as reasons:
        warnings.simplefilter("ignore")  # deprecations inside the converter, which nobody here can act on
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.utils.configs import get_transform_passes
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        if quant_vision is not None:
            _quantize(module, quant_vision)
        edge = to_edge_transform_and_lower(
            trace(module, example_inputs),
            partitioner=[XnnpackPartitioner()],
            transform_passes=get_transform_passes(),
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        coverage = _coverage(edge.exported_program(), reasons)
        program = edge.to_executorch()
        file = f"{graph_name}.pte"
        with open(out_dir / file, "wb") as out:
            program.write_to_file(out)
    return LoweredGraph(file=file, extra_files=(), coverage=(coverage,))


def _quantize(module: torch.nn.Module, scheme: str) -> None:
    """8-bit weights per output channel, activations quantised on the fly, in every linear layer but the pruner's."""
    import torch
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    if scheme != "8da8w":
        raise ExportError(f"quant_vision={scheme!r} is not known to this backend; allowed: 8da8w")
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantize_(module, config)


@contextmanager
def _rejections() -> Iterator[dict[str, str]]:
    """Collects the partitioner's own words on why it left a node: node name -> reason."""
    reasons: dict[str, str] = {}

    class Collect(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            said: Any = record.msg
            if getattr(said, "node", None) is not None:
                reasons[said.node.name] = str(said.reason).rstrip(".")
                return False
            return record.levelno >= logging.WARNING

    collect = Collect()
    logger = logging.getLogger("executorch.backends.xnnpack.partition.config.xnnpack_config")
    level = logger.level
    logger.addFilter(collect)
    logger.setLevel(logging.DEBUG)
    try:
        yield reasons
    finally:
        logger.removeFilter(collect)
        logger.setLevel(level)


def _coverage(program: torch.export.ExportedProgram, reasons: dict[str, str]) -> DelegateCoverage:
    """How many nodes the delegate took, in how many partitions, and why it left the others."""
    from operator import getitem

    from executorch.exir.delegate import executorch_call_delegate
    from executorch.exir.lowered_backend_module import get_lowered_backend_modules

    from runtime.bundle import DelegateCoverage, OutsideOp

    partitions = get_lowered_backend_modules(program.graph_module)
    nodes = sum(
        node.op == "call_function" and node.target is not getitem
        for partition in partitions
        for node in partition.original_module.graph.nodes
    )
    outside: Counter[tuple[str, str]] = Counter()
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target not in (executorch_call_delegate, getitem):
            outside[_operator(node), _reason(node, reasons)] += 1
    return DelegateCoverage(
        delegate="XnnpackBackend",
        partitions=len(partitions),
        nodes=nodes,
        outside=tuple(OutsideOp(op=op, count=count, reason=why) for (op, why), count in outside.most_common()),
    )


def _operator(node: torch.fx.Node) -> str:
    name = getattr(node.target, "_name", None) or getattr(node.target, "__name__", str(node.target))
    return str(name).replace("::", ".")


def _reason(node: torch.fx.Node, reasons: dict[str, str]) -> str:
    """The partitioner's reason, else what can be told from the data types."""
    if node.name in reasons:
        return reasons[node.name]
    dtypes = sorted(
        {
            str(n.meta["val"].dtype).removeprefix("torch.")
            for n in (*node.all_input_nodes, node)
            if "val" in n.meta and hasattr(n.meta["val"], "dtype")
        }
    )
    if len(dtypes) > 1:
        return f"mixes {' and '.join(dtypes)}; the delegate converts no data types"
    if dtypes and dtypes[0] not in ("float32", "float16"):
        return f"computes in {dtypes[0]}; the delegate takes floating point only"
    return "not in the delegate's list of operators"
