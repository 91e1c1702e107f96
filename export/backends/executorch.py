"""Programs of ExecuTorch: graphs as its methods, lowered to one delegate; what that took, and why not the rest."""

from __future__ import annotations

import gc
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from export.backends import replays
from export.backends.backend import LoweredGraph
from export.backends.tracing import converting, trace

if TYPE_CHECKING:
    import torch

    from export.backends.packed import Packed
    from export.graphs.graph import Graph
    from runtime.bundle import DelegateCoverage


FILE = "model.pte"


@dataclass(frozen=True)
class Delegate:
    """A delegate: its name inside programs, what lowers to it (partitioner, passes before it), and how it explains.

    `logger` is where its partitioner says why it left a node; `said` makes (which node, why) of such a line, None of
    others, and `key` is how that line calls a node.
    """

    name: str
    load: Callable[[], tuple[Any, list[Any]]]
    logger: str
    said: Callable[[logging.LogRecord], tuple[str, str] | None]
    key: Callable[[torch.fx.Node], str]
    converts: bool
    # What is in force while it writes its programs, and for it whether it reads weights that wait only as it writes
    # them: other delegates get all weights of a graph before it is traced.
    serialising: Callable[[Packed], AbstractContextManager[Any]] = nullcontext
    reads_late: bool = False


def lower(
    graphs: Mapping[str, Graph],
    out_dir: Path,
    delegate: Delegate,
    *,
    trace: Callable[[Graph], torch.export.ExportedProgram] = trace,
) -> dict[str, LoweredGraph]:
    """Writes one program with a method for each graph, everything that the delegate takes lowered to it.

    Weights that several graphs hold are stored once. Raises ExportError when a shape is symbolic or an
    operator cannot be converted.
    """
    # Inputs are read where the caller has them: copying them in would copy the whole KV cache for every token.
    coverage = write_program(graphs, out_dir, delegate, trace=trace, copies_inputs=False)
    return {name: LoweredGraph(file=FILE, extra_files=(), coverage=(taken,)) for name, taken in coverage.items()}


def write_program(
    graphs: Mapping[str, Graph],
    out_dir: Path,
    delegate: Delegate,
    *,
    trace: Callable[[Graph], torch.export.ExportedProgram],
    copies_inputs: bool,
    constants: Mapping[str, Any] | None = None,
) -> dict[str, DelegateCoverage]:
    """Traces, lowers and writes FILE, with a method that returns it for each of `constants`.

    One graph after the other, and what the delegate packed lies on disk until the program is written, under the name
    of its content: lowered together, five graphs that share their weights took five times the memory. Weights that wait
    in their checkpoint are read one at a time, as the delegate comes to them. CheckpointError where that fails.
    """
    with TemporaryDirectory(dir=out_dir) as folder, warnings.catch_warnings(), _rejections(delegate) as reasons:
        warnings.simplefilter("ignore")  # deprecations inside the converter, which nobody here can act on
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass
        from executorch.exir.program import EdgeProgramManager

        from export.backends.packed import Packed
        from export.weights import read_now

        config = EdgeCompileConfig(_check_ir_validity=False)
        packed = Packed(Path(folder))
        methods, coverage = {}, {}
        partitioner, passes = delegate.load()
        for name, graph in graphs.items():
            if not delegate.reads_late:
                read_now(graph)
            packed.expect(graph)
            traced = {name: trace(graph)}
            with converting("ExecuTorch", traced), packed.on_disk(), delegate.serialising(packed), replays.left_out():
                edge = to_edge_transform_and_lower(
                    traced,
                    partitioner={name: [partitioner]},
                    transform_passes=passes,
                    compile_config=config,
                )
            methods[name] = edge.exported_program(name)
            coverage[name] = _coverage(methods[name], delegate, reasons)
            packed.forget()
            reasons.clear()
            del edge, traced, graph
            gc.collect()
        planning = MemoryPlanningPass(alloc_graph_input=copies_inputs)
        with converting("ExecuTorch", methods):
            for program in methods.values():
                packed.read_rest(program)
            packed.forget()
            edge = EdgeProgramManager(methods, dict(constants or {}), config)
            program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
        with open(out_dir / FILE, "wb") as out:
            program.write_to_file(out)
    return coverage


@contextmanager
def _rejections(delegate: Delegate) -> Iterator[dict[str, str]]:
    """Collects the partitioner's own words on why it left a node: what it calls the node -> reason."""
    reasons: dict[str, str] = {}

    class Collect(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            said = delegate.said(record)
            if said is not None:
                reasons[said[0]] = said[1]
                return False
            return record.levelno >= logging.WARNING

    collect = Collect()
    logger, root = logging.getLogger(delegate.logger), logging.getLogger()
    levels = logger.level, root.level
    logger.addFilter(collect)
    # The root logger's level is that of many others, and Vulkan's partitioner says INFO; it sets it when imported, too.
    logger.setLevel(logging.INFO if logger is root else logging.DEBUG)
    silent = logging.NullHandler()
    root.addHandler(silent)  # without any handler, the first line through the root logger sets one up for good
    try:
        yield reasons
    finally:
        root.removeHandler(silent)
        logger.removeFilter(collect)
        logger.setLevel(levels[0])
        root.setLevel(levels[1])


def _coverage(program: torch.export.ExportedProgram, delegate: Delegate, reasons: dict[str, str]) -> DelegateCoverage:
    """How many nodes the delegate took, in how many partitions, and why it left the others."""
    from operator import getitem

    from executorch.exir.delegate import executorch_call_delegate

    from runtime.bundle import DelegateCoverage, OutsideOp

    outside: Counter[tuple[str, str]] = Counter()
    runs: list[int] = []
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is getitem:
            continue
        if node.target is executorch_call_delegate:
            partition = getattr(program.graph_module, node.args[0].name).original_module.graph
            runs.append(sum(part.op == "call_function" and part.target is not getitem for part in partition.nodes))
            continue
        outside[_operator(node), _reason(node, delegate, reasons)] += 1
        if runs and runs[-1] < 0:
            runs[-1] -= 1
        else:
            runs.append(-1)
    taken = [run for run in runs if run > 0]
    return DelegateCoverage(
        delegate=delegate.name,
        partitions=len(taken),
        nodes=sum(taken),
        outside=tuple(OutsideOp(op=op, count=count, reason=why) for (op, why), count in outside.most_common()),
        runs=tuple(runs),
    )


def _operator(node: torch.fx.Node) -> str:
    name = getattr(node.target, "_name", None) or getattr(node.target, "__name__", str(node.target))
    return str(name).replace("::", ".")


def _reason(node: torch.fx.Node, delegate: Delegate, reasons: dict[str, str]) -> str:
    """The partitioner's reason, else what can be told from the data types."""
    said = reasons.get(delegate.key(node))
    if said is not None:
        return said
    if delegate.converts:
        return "left by the delegate without a word"
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
