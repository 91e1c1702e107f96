"""Graphs for phone CPUs: ExecuTorch programs lowered to its XNNPACK delegate."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends import executorch, replays
from export.backends.backend import Backend, LoweredGraph
from export.backends.executorch import Delegate

if TYPE_CHECKING:
    import logging

    import torch

    from export.backends.packed import Packed
    from export.graphs.graph import Graph


def lower(graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    """Writes one program with a method for each graph; see `export.backends.executorch.lower`."""
    return executorch.lower(graphs, out_dir, DELEGATE)


# A partition ends behind the layer in which it comes to hold so many numbers: while one is opened, its weights are in
# memory as the file has them and as they are packed, and only then the former are given back.
PIECE_NUMBERS = 350_000_000
_LAYER = re.compile(r".*layers\.\d+\b")


def _partitioner() -> tuple[Any, list[Any]]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes

    class InPieces(XnnpackPartitioner):  # type: ignore[misc]
        def partition(self, exported_program: Any) -> Any:
            result = super().partition(exported_program)
            for tag, spec in list(result.partition_tags.items()):
                for piece in split(exported_program, tag):
                    result.partition_tags[piece] = spec
            return result

    return InPieces(), get_transform_passes()


def split(program: torch.export.ExportedProgram, tag: str) -> list[str]:
    """Tags the nodes of a large partition anew, some whole layers each, and returns the tags beside the first one."""
    from executorch.backends.xnnpack.utils.utils import is_param_node

    made: list[str] = []
    layer, held = "", 0
    seen: set[torch.fx.Node] = set()
    for node in program.graph.nodes:
        if node.meta.get("delegation_tag") != tag:
            continue
        stack = node.meta.get("nn_module_stack") or {}
        inside = next((found[0] for path, _ in stack.values() if (found := _LAYER.match(path))), None)
        if inside is not None and inside != layer:
            if held >= PIECE_NUMBERS:
                made.append(f"{tag}_{len(made) + 1}")
                held = 0
            layer = inside
        for value in node.all_input_nodes:
            if value.op == "placeholder" and value not in seen and is_param_node(program, value):
                seen.add(value)
                held += value.meta["val"].numel()
        if made:
            node.meta["delegation_tag"] = made[-1]
    return made


def _said(record: logging.LogRecord) -> tuple[str, str] | None:
    said: Any = record.msg
    return None if getattr(said, "node", None) is None else (said.node.name, str(said.reason).rstrip("."))


@contextmanager
def _serialising(packed: Packed) -> Iterator[None]:
    with _late(packed), _half_stored(packed), _needed_patterns():
        yield


# Two of XNNPACK's passes look for patterns that they make by exporting small modules, which takes as long as lowering a
# small graph does; a part of a program without these operators holds none of them.
SIGNS = {"ConvertToUpsampleBilinear2d": "aten::upsample_bilinear2d.vec", "ConvertToSDPAPass": "aten::logical_not"}


@contextmanager
def _needed_patterns() -> Iterator[None]:
    """Has a pass of SIGNS run only on programs that hold its sign."""
    from executorch.backends.xnnpack._passes import XNNPACKPassManager

    usual = XNNPACKPassManager.transform

    def transform(self: Any) -> Any:
        there = {getattr(node.target, "_name", None) for node in self.exported_program.graph.nodes}
        self.passes = [one for one in self.passes if SIGNS.get(one.__name__) in (None, *there)]
        return usual(self)

    with replays.replaced(XNNPACKPassManager, "transform", transform):
        yield


@contextmanager
def _late(packed: Packed) -> Iterator[None]:
    """Has weights that wait read when XNNPACK's serialiser comes to them, and none that it packed for another graph."""
    import torch
    from executorch.backends.xnnpack.operators import node_visitor as serialising
    from executorch.backends.xnnpack.utils.utils import is_param_node
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend

    visitors: Any = serialising.NodeVisitor
    fetch = serialising.get_param_tensor
    add_buffer, add_params = visitors.get_serialized_buffer_index, visitors.get_quant_params

    def once(visitor: Any, constants: list[Any], key: tuple[object, ...], pack: Callable[[], Any]) -> Any:
        """What `pack` returned for this key; what it adds to constants and store is added for every graph."""
        store = visitor._named_data_store
        if key in packed.known:
            result, added = packed.known[key]
            for constant, data, alignment in added:
                constants.append(constant)
                store.add_named_data(constant.named_key, data, alignment)
            return result
        first = len(constants)
        result = pack()
        packed.known[key] = (
            result,
            [
                (
                    constant,
                    store.buffers[store.key_to_buffer_idx[constant.named_key]],
                    store.pte_data[constant.named_key].alignment,
                )
                for constant in constants[first:]
            ],
        )
        return result

    def buffer_index(
        self: Any,
        tensor: torch.fx.Node,
        xnn_graph: Any,
        vals_to_ids: Any,
        convert_to_nhwc: bool,
        swap_in_out_for_weights: bool,
        quant_params: Any,
        force_fp32: bool = False,
        groups: int = 1,
    ) -> int:
        how = convert_to_nhwc, swap_in_out_for_weights, quant_params, force_fp32, groups

        def pack() -> int:
            return int(add_buffer(self, tensor, xnn_graph, vals_to_ids, *how))

        node = tensor if quant_params is None else quant_params.q_input
        held = fetch(self._exported_program, node) if is_param_node(self._exported_program, node) else None
        weight = None if held is None else packed.key(held)
        if weight is None:
            return pack()
        index = len(xnn_graph.constant_data)
        stored_as = self.get_serialized_dtype(quant_params, tensor, force_fp32)
        key = (*weight, stored_as, convert_to_nhwc, swap_in_out_for_weights, groups)
        once(self, xnn_graph.constant_data, key, pack)
        return index

    def scales(self: Any, quant_params: Any, xnn_graph: Any, external_tag: str | None = None) -> Any:
        waiting = quant_params.scale
        weight = packed.key(waiting) if isinstance(waiting, torch.Tensor) else None
        if weight is None:
            return add_params(self, quant_params, xnn_graph, external_tag)

        def pack() -> Any:
            read = copy(quant_params)
            read.scale = packed.numbers(waiting)
            return add_params(self, read, xnn_graph, external_tag)

        index = len(xnn_graph.constant_data)
        return replace(once(self, xnn_graph.constant_data, weight, pack), scale_buffer_idx=index)

    def shared(program: torch.export.ExportedProgram, specs: Any) -> torch.export.ExportedProgram:
        """A copy for the delegate's passes to change, but of the weights, whose numbers they leave alone."""
        held = (*program.state_dict.values(), *program.constants.values())
        return deepcopy(program, {id(tensor): tensor for tensor in held})

    with ExitStack() as stack:
        for owner, name, ours in (
            (serialising, "get_param_tensor", lambda program, node: packed.numbers(fetch(program, node))),
            (visitors, "get_serialized_buffer_index", buffer_index),
            (visitors, "get_quant_params", scales),
            (XnnpackBackend, "copy_exported_program_for_preprocess", shared),
        ):
            stack.enter_context(_replaced(owner, name, ours))
        yield


@contextmanager
def _replaced(owner: Any, name: str, ours: Any) -> Iterator[None]:
    inherited = name not in vars(owner)
    usual = getattr(owner, name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, usual)


@contextmanager
def _half_stored(packed: Packed) -> Iterator[None]:
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
            key = packed.key(value)
            if key is None:
                return _in_half(value)
            if (*key, "in half") not in packed.known:
                packed.known[*key, "in half"] = _in_half(packed.numbers(value))
            return bool(packed.known[*key, "in half"])

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


def _in_half(value: torch.Tensor) -> bool:
    """Whether float16 holds exactly these numbers."""
    return bool((value.half().float() == value).all())


DELEGATE = Delegate(
    name="XnnpackBackend",
    load=_partitioner,
    logger="executorch.backends.xnnpack.partition.config.xnnpack_config",
    said=_said,
    key=lambda node: node.name,
    converts=False,
    serialising=_serialising,
    reads_late=True,
)

XNNPACK = Backend(
    name="xnnpack",
    engine="executorch",
    # Phones since Armv8.2 add float16 products up in 16 bits, which costs tokens (docs/precision.md); in fp32 every
    # processor gives the same, from a file of the same size.
    precisions=("fp32", "fp16"),
    quant_vision=("8da8w",),
    quant_text=("8da4w", "8da4w-g64", "8da4w-g32", "8da8w"),
    quant_vision_with_text="8da8w",
    quant_rows="int8",
    packages=("torch", "transformers", "executorch", "torchao"),
    lower=lower,
    one_by_one=True,
    open_axes=True,
    reads_late=True,
)
