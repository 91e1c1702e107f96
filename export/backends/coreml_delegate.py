"""Graphs for iOS through ExecuTorch: programs lowered to its Core ML delegate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends import executorch
from export.backends.backend import Backend, LoweredGraph, Variants
from export.backends.coreml import converter
from export.backends.executorch import Delegate
from export.backends.tracing import trace

if TYPE_CHECKING:
    import logging

    import torch

    from export.graphs.graph import Graph


def lower(graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    """Writes one program with a method for each graph, whose package holds its weights; coremltools is kept quiet."""
    with converter():
        return executorch.lower(graphs, out_dir, DELEGATE, trace=lambda graph: _multiplied(trace(graph)))


def _multiplied(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """With products in the place of float16's divisions, which coremltools makes float32, and all that follows.

    A cast back, as packages of our own have it, would not survive ExecuTorch, which takes it for one that does nothing;
    what coremltools makes of a reciprocal adds 1e-4 first, and a power is float32 again. Only the norms divide in
    float16, by what is above zero: its reciprocal is the square of its inverse root, whose rounding cancels there.
    """
    import torch

    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor):
        if node.meta["val"].dtype == torch.float16:
            one, other = node.args
            with program.graph.inserting_before(node):
                root = program.graph.call_function(torch.ops.aten.rsqrt.default, (other,))
                inverse = program.graph.call_function(torch.ops.aten.mul.Tensor, (root, root))
                product = program.graph.call_function(torch.ops.aten.mul.Tensor, (one, inverse))
            root.meta, inverse.meta, product.meta = dict(other.meta), dict(other.meta), dict(node.meta)
            node.replace_all_uses_with(product)
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _partitioner() -> tuple[Any, list[Any]]:
    import coremltools as ct
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    # What float32 means here is that no dtype is changed: fp16 graphs come in float16, but for the pruner.
    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=ct.precision.FLOAT32, minimum_deployment_target=ct.target.iOS18
    )
    return CoreMLPartitioner(compile_specs=specs), []


def _said(record: logging.LogRecord) -> tuple[str, str] | None:
    _, skipping, operator = record.getMessage().partition("not supported by CoreML: ")
    return (operator, "coremltools cannot convert it") if skipping else None


DELEGATE = Delegate(
    name="CoreMLBackend",
    load=_partitioner,
    logger="executorch.backends.apple.coreml.partition.coreml_partitioner",
    said=_said,
    key=lambda node: str(getattr(node.target, "__name__", "")).lower(),
    converts=True,
)


_IOS_18 = Backend(
    name="executorch",
    engine="executorch",
    precisions=("fp16", "fp32"),
    quant_vision=(),
    quant_text=(),
    packages=("torch", "transformers", "executorch", "coremltools"),
    lower=lower,
    made_for="iOS 18 and later",
    min_os="18",
    text_copies=3,
    # Packages lie in memory until the program is written, and once more when they are taken out of it: the vision graph
    # of llava-1.5-7b took 8.9 GiB.
    ram_factor=1.8,
)
COREML_DELEGATE = replace(_IOS_18, variants=Variants("min_ios", lambda: {"18": _IOS_18}, default="18"))
