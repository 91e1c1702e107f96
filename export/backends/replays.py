"""What ExecuTorch would do again and again to a graph that stays as it is, left out while a program is lowered.

Lowering runs some sixty passes, most of which look for something that our graphs do not have and then run the whole
graph through an interpreter again, node by node, only to refresh what is known of each result. Nothing here decides
anything about the program: the file that is written is the same, byte for byte. Whatever of this another version of
torch or ExecuTorch does not have is done the usual way there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    import torch
    from torch.fx import Graph, GraphModule


@contextmanager
def left_out() -> Iterator[None]:
    """While this is in force, lowering leaves out what changes nothing."""
    with ExitStack() as changes:
        for change in (_shared_histories, _replays_of_changed_graphs, _unchecked_passes, _needed_decompositions):
            changes.enter_context(change())
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Has `owner.name` be `value`, and as before afterwards."""
    own = name in vars(owner)
    usual = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, usual)
        else:
            delattr(owner, name)


@contextmanager
def _shared_histories() -> Iterator[None]:
    """Each pass copies each node's list of ancestors, all of their ancestors included; nobody writes into them."""
    from torch.fx import traceback

    source = getattr(traceback, "NodeSource", None)
    if source is None:
        yield
        return
    with replaced(source, "__deepcopy__", lambda self, memo: self):
        yield


@contextmanager
def _replays_of_changed_graphs() -> Iterator[None]:
    """A pass replays a graph only if something in it is not as the last replay left it.

    That is for passes that replay nodes as they are; one that has a say in how a node is replayed always does it.
    """
    from executorch.exir import pass_base

    base = getattr(pass_base, "_ExportPassBase", None)
    usual = getattr(base, "call", None)
    if usual is None:
        yield
        return
    left: list[Any] | None = None

    def call(self: Any, module: GraphModule) -> Any:
        nonlocal left
        if not _only_replays(type(self)):
            return usual(self, module)
        if left is None or _state(module.graph) != left:
            module = usual(self, module).graph_module
            left = _state(module.graph)
        return pass_base.PassResult(module, True)

    with replaced(base, "call", call):
        yield


def _only_replays(kind: type) -> bool:
    """True of a pass that overrides nothing of what ExecuTorch's own class of passes does with a node."""
    from executorch.exir.pass_base import ExportPass, _ExportPassBase

    bases = (ExportPass, _ExportPassBase)
    usual = {name for base in bases for name in vars(base) if not name.startswith("__")} - {"call", "_abc_impl"}
    own = kind.__mro__[: next(at for at, ancestor in enumerate(kind.__mro__) if ancestor in bases)]
    return usual.isdisjoint(name for ancestor in own for name in vars(ancestor))


def _state(graph: Graph) -> list[Any] | None:
    """All that a replay of the graph depends on and results in; None if tensors or other graphs are inside it."""
    if any(node.op == "get_attr" for node in graph.nodes):
        return None
    return [(n, n.name, n.op, n.target, n.args, n.kwargs, id(n.meta.get("val"))) for n in graph.nodes]


@contextmanager
def _unchecked_passes() -> Iterator[None]:
    """Programs are verified where they are made, not before and behind each pass as well."""
    from executorch.exir import pass_manager

    manager = getattr(pass_manager, "ExportedProgramPassManager", None)
    if not hasattr(manager, "check"):
        yield
        return
    with replaced(manager, "check", lambda self, program: None):
        yield


@contextmanager
def _needed_decompositions() -> Iterator[None]:
    """A program that was decomposed is decomposed again only if it holds an operator that is to be decomposed."""
    import torch

    usual = torch.export.ExportedProgram.run_decompositions
    made: WeakSet[torch.export.ExportedProgram] = WeakSet()

    def run_decompositions(self: torch.export.ExportedProgram, decomp_table: Any = None, **more: Any) -> Any:
        if self not in made or decomp_table is None or any(op in decomp_table for op in _operators(self.graph_module)):
            self = usual(self, decomp_table, **more)
            made.add(self)
        return self

    with replaced(torch.export.ExportedProgram, "run_decompositions", run_decompositions):
        yield


def _operators(module: GraphModule) -> set[Any]:
    """What the nodes of a graph call, and those of the graphs inside it."""
    import torch

    graphs = [part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
    return {node.target for graph in graphs for node in graph.nodes if node.op == "call_function"}
