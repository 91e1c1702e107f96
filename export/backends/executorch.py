"""Graphs for ExecuTorch, lowered to one of its delegates: XNNPACK for the CPU, Vulkan for the GPU, Core ML."""

from __future__ import annotations

import gc
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from export.backends.tracing import converting, trace
from export.targets import LoweredGraph

if TYPE_CHECKING:
    import torch

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
    # What is in force while it writes its programs.
    serialising: Callable[[], AbstractContextManager[None]] = nullcontext


def _xnnpack() -> tuple[Any, list[Any]]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes

    return XnnpackPartitioner(), get_transform_passes()


def _xnnpack_said(record: logging.LogRecord) -> tuple[str, str] | None:
    said: Any = record.msg
    return None if getattr(said, "node", None) is None else (said.node.name, str(said.reason).rstrip("."))


def _vulkan() -> tuple[Any, list[Any]]:
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return VulkanPartitioner(), []


def _vulkan_said(record: logging.LogRecord) -> tuple[str, str] | None:
    reason, skipping, node = record.getMessage().partition("], skipping ")
    if not skipping:
        return None
    # Behind these words comes the node once more.
    return node, reason.partition("Due to [")[2].partition(" for op ")[0]


def _vulkan_key(node: torch.fx.Node) -> str:
    from executorch.backends.vulkan.utils import node_io_str

    return str(node_io_str(node))


def _core_ml() -> tuple[Any, list[Any]]:
    import coremltools as ct
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    # What float32 means here is that no dtype is changed: fp16 graphs come in float16, but for the pruner.
    specs = CoreMLBackend.generate_compile_specs(
        compute_precision=ct.precision.FLOAT32, minimum_deployment_target=ct.target.iOS18
    )
    return CoreMLPartitioner(compile_specs=specs), []


def _core_ml_said(record: logging.LogRecord) -> tuple[str, str] | None:
    _, skipping, operator = record.getMessage().partition("not supported by CoreML: ")
    return (operator, "coremltools cannot convert it") if skipping else None


def _xnnpack_serialising() -> AbstractContextManager[None]:
    return _half_stored()


XNNPACK = Delegate(
    name="XnnpackBackend",
    load=_xnnpack,
    logger="executorch.backends.xnnpack.partition.config.xnnpack_config",
    said=_xnnpack_said,
    key=lambda node: node.name,
    converts=False,
    serialising=_xnnpack_serialising,
)
# Its partitioner speaks through the root logger.
VULKAN = Delegate(name="VulkanBackend", load=_vulkan, logger="", said=_vulkan_said, key=_vulkan_key, converts=True)

CORE_ML = Delegate(
    name="CoreMLBackend",
    load=_core_ml,
    logger="executorch.backends.apple.coreml.partition.coreml_partitioner",
    said=_core_ml_said,
    key=lambda node: str(getattr(node.target, "__name__", "")).lower(),
    converts=True,
)


@contextmanager
def _half_stored() -> Iterator[None]:
    """Has XNNPACK's float32 linear layers written with float16 weights, where these are exactly the same numbers.

    XNNPACK expands them again when it loads a program and computes in float32 as before: the file halves, and not a
    bit of a result changes. Checkpoints are published in 16 bits, so that most weights are such numbers.
    """
    import executorch.backends.xnnpack.operators.op_linear  # noqa: F401  registers the visitor for linear layers
    import torch
    from executorch.backends.xnnpack.operators import node_visitor as serialising
    from executorch.backends.xnnpack.utils.utils import get_input_node, get_param_tensor, is_param_node

    kinds = serialising._node_visitor_dict
    usual: Any = kinds["aten.linear.default"]

    class HalfStored(usual):  # type: ignore[misc]
        _half: torch.fx.Node | None = None

        def define_node(self, node: torch.fx.Node, xnn_graph: Any, vals_to_ids: Any, debug_handle: int) -> None:
            weight = get_input_node(node, 1)
            self._half = weight if self._fits(weight) else None
            super().define_node(node, xnn_graph, vals_to_ids, debug_handle)

        def _fits(self, weight: torch.fx.Node) -> bool:
            if not is_param_node(self._exported_program, weight) or weight.meta["val"].dtype != torch.float32:
                return False
            # Another operator would find the numbers in a type that it does not take.
            for user in weight.users:
                if getattr(user.target, "__name__", "") != usual.target or user.args[1] is not weight:
                    return False
            value = get_param_tensor(self._exported_program, weight)
            return bool(torch.equal(value.half().float(), value))

        def get_serialized_dtype(self, quant_params: Any, node: torch.fx.Node, force_fp32: bool = False) -> Any:
            if node is self._half:
                return serialising.XNNDatatype.xnn_datatype_fp16
            return super().get_serialized_dtype(quant_params, node, force_fp32)

        def get_serialized_buffer_index(self, tensor: torch.fx.Node, *args: Any) -> int:
            if tensor is not self._half:
                return int(super().get_serialized_buffer_index(tensor, *args))
            # The serialiser keeps the type of float16 constants; it fetches them by this name.
            fetch = serialising.get_param_tensor
            serialising.get_param_tensor = lambda program, node: fetch(program, node).half()
            try:
                return int(super().get_serialized_buffer_index(tensor, *args))
            finally:
                serialising.get_param_tensor = fetch

    kinds["aten.linear.default"] = HalfStored
    try:
        yield
    finally:
        kinds["aten.linear.default"] = usual


def lower_to_core_ml(graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    """`lower` for Core ML's delegate, with coremltools kept quiet; each graph's package holds its own weights."""
    from export.backends.coreml import converter

    with converter():
        return lower(graphs, out_dir, CORE_ML, trace=lambda graph: _multiplied(trace(graph)))


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


def lower(
    graphs: Mapping[str, Graph],
    out_dir: Path,
    delegate: Delegate = XNNPACK,
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
    delegate: Delegate = XNNPACK,
    *,
    trace: Callable[[Graph], torch.export.ExportedProgram],
    copies_inputs: bool,
    constants: Mapping[str, Any] | None = None,
) -> dict[str, DelegateCoverage]:
    """Traces, lowers and writes FILE, with a method that returns it for each of `constants`.

    One graph after the other, and what the delegate packed lies on disk until the program is written, under the name
    of its content: lowered together, five graphs that share their weights took five times the memory.
    """
    with TemporaryDirectory(dir=out_dir) as packed, warnings.catch_warnings(), _rejections(delegate) as reasons:
        warnings.simplefilter("ignore")  # deprecations inside the converter, which nobody here can act on
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.passes import MemoryPlanningPass
        from executorch.exir.program import EdgeProgramManager

        config = EdgeCompileConfig(_check_ir_validity=False)
        methods, coverage = {}, {}
        partitioner, passes = delegate.load()
        for name, graph in graphs.items():
            traced = {name: trace(graph)}
            with converting("ExecuTorch", traced), delegate.serialising():
                edge = to_edge_transform_and_lower(
                    traced,
                    partitioner={name: [partitioner]},
                    transform_passes=passes,
                    compile_config=config,
                )
            methods[name] = edge.exported_program(name)
            coverage[name] = _coverage(methods[name], delegate, reasons)
            _move_to_disk(methods[name], Path(packed))
            reasons.clear()
            del edge, traced
            gc.collect()
        planning = MemoryPlanningPass(alloc_graph_input=copies_inputs)
        with converting("ExecuTorch", methods):
            edge = EdgeProgramManager(methods, dict(constants or {}), config)
            program = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
        with open(out_dir / FILE, "wb") as out:
            program.write_to_file(out)
    return coverage


def _move_to_disk(program: torch.export.ExportedProgram, folder: Path) -> None:
    """Puts the delegate's packed weights into files named by their content, where other graphs' find the same ones."""
    from executorch.exir._serialize._cord import FileBackedData
    from executorch.exir.lowered_backend_module import get_lowered_backend_modules

    for partition in get_lowered_backend_modules(program.graph_module):
        stored = partition.named_data_store_output
        if stored is None:
            continue
        for index, data in enumerate(stored.buffers):
            digest = hashlib.sha256(data)
            file = folder / digest.hexdigest()
            if not file.exists():
                file.write_bytes(data)
            stored.buffers[index] = FileBackedData(str(file), sha256=digest.digest())


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
