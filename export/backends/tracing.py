"""Tracing a graph into an exported program that is open only where it says so; telling what a converter refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from runtime.errors import ExportError, PruneportError

if TYPE_CHECKING:
    import torch

    from export.graphs.graph import Graph

_LONGEST_REASON = 300


def trace(graph: Graph) -> torch.export.ExportedProgram:
    """`graph` as an exported program whose shapes are numbers, but for the axes that it calls open.

    Raises ExportError when it cannot be traced or when another shape is symbolic.
    """
    import torch

    inputs, axes = graph.example_inputs(), graph.open_axes()
    infos = {info.name: info for info in graph.input_infos()}
    lengths: dict[str, torch.export.Dim] = {}
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]  # of torch
    for (name, info), example in zip(infos.items(), inputs, strict=True):
        for axis, length in axes.get(name, {}).items():
            lengths.setdefault(length, torch.export.Dim(length, min=1, max=info.shape[axis]))
        if name in axes:
            shapes[example] = {axis: lengths[length] for axis, length in axes[name].items()}
    try:
        with torch.no_grad():
            program = torch.export.export(graph, inputs, dynamic_shapes=shapes if axes else None, strict=False)
    except Exception as error:
        raise ExportError(
            f"{type(graph).__name__} cannot be traced: {_reason(error)}; rewrite what stops torch.export there"
        ) from error
    if axes:
        return program
    for node in program.graph.nodes:
        value = node.meta.get("val")
        found = [v.shape for v in (value if isinstance(value, (tuple, list)) else (value,)) if hasattr(v, "shape")]
        if any(not isinstance(side, int) for shape in found for side in shape):
            raise ExportError(
                f"{node.name} has the symbolic shape {found}; a phone's delegate needs numbers: rewrite {node.target} "
                "without data-dependent sizes"
            )
    return program


@contextmanager
def converting(converter: str, programs: Mapping[str, torch.export.ExportedProgram | None]) -> Iterator[None]:
    """While a converter works on the programs of these graphs, whatever it raises becomes an ExportError.

    It names the operator that was refused and the module that computes it, where the converter's error leads to one.
    A program may be None where the converter traces the graph itself.
    OSErrors pass: a full disk is no matter of the converter.
    """
    try:
        yield
    except (PruneportError, OSError):
        raise
    # Converters raise what they like, and what they call raises more.
    except Exception as error:
        found = _refused(error, programs)
        if found is None:
            raise ExportError(
                f"{converter} failed on {', '.join(programs)}: {_reason(error)}; "
                "choose another --backend, and please report this"
            ) from error
        graph, node = found
        raise ExportError(
            f"{converter} cannot convert the operator {_operator(node)}, which {_module(node)} of {graph} computes: "
            f"{_reason(error)}; rewrite that module without it, or choose another --backend"
        ) from error


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it came from, the first cause first."""
    chain = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    return chain[::-1]


def _reason(error: BaseException) -> str:
    """What the first cause says, on one line."""
    first = _chain(error)[0]
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    said = lines[0].rstrip(".") if lines else ""
    said = said if len(said) <= _LONGEST_REASON else f"{said[:_LONGEST_REASON]}..."
    return f"{type(first).__name__}: {said}" if said else type(first).__name__


def _refused(
    error: BaseException, programs: Mapping[str, torch.export.ExportedProgram | None]
) -> tuple[str, torch.fx.Node] | None:
    """The node that a converter was at and its graph: converters call it `node` as they walk, or spell its operator."""
    nodes = [
        (name, node)
        for name, program in programs.items()
        for node in (program.graph.nodes if program else ())
        if hasattr(node.target, "_schema")
    ]
    for cause in _chain(error):
        for frame in reversed(_frames(cause)):
            at = frame.get("node")
            if hasattr(getattr(at, "target", None), "_schema"):
                return next((name for name, node in nodes if node.name == at.name), ", ".join(programs)), at
            # What a converter makes of a node keeps its name.
            for name, node in nodes:
                if getattr(at, "name", None) == node.name:
                    return name, node
    for cause in _chain(error):
        for name, node in nodes:
            operator: str = node.target._schema.name
            if re.search(rf"(?<![\w.]){'(::|[.])'.join(map(re.escape, operator.split('::')))}(?!\w)", str(cause)):
                return name, node
    return None


def _frames(error: BaseException) -> list[dict[str, Any]]:
    found, at = [], error.__traceback__
    while at is not None:
        found.append(at.tb_frame.f_locals)
        at = at.tb_next
    return found


def _operator(node: torch.fx.Node) -> str:
    schema = getattr(node.target, "_schema")  # noqa: B009 - every operator of torch has one; its stubs do not say so
    return ".".join(filter(None, (*schema.name.split("::"), schema.overload_name)))


def _module(node: torch.fx.Node) -> str:
    """The innermost module that was being run when the node was traced: its path and its class."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return "a step"
    path, kind = stack[-1]
    kind = str(getattr(kind, "__qualname__", kind)).rpartition(".")[2]
    return f"{path} ({kind})" if path else str(kind)
