"""Tracing a graph into an exported program whose every shape is a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.errors import ExportError

if TYPE_CHECKING:
    import torch

    from export.graphs.graph import Graph


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """`graph` as an exported program with static shapes. Raises ExportError when a shape is symbolic."""
    import torch

    with torch.no_grad():
        program = torch.export.export(graph, graph.example_inputs(), strict=False)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        shapes = [v.shape for v in (value if isinstance(value, (tuple, list)) else (value,)) if hasattr(v, "shape")]
        if any(not isinstance(side, int) for shape in shapes for side in shape):
            raise ExportError(
                f"{node.name} has the symbolic shape {shapes}; a phone's delegate needs numbers: rewrite {node.target} "
                "without data-dependent sizes"
            )
    return program
