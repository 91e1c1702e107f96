"""Graphs for phone CPUs: ExecuTorch programs lowered to its XNNPACK delegate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends import executorch, replays
from export.backends.backend import Backend, LoweredGraph
from export.backends.executorch import Delegate

if TYPE_CHECKING:
    import logging

    import torch

    from export.graphs.graph import Graph


def lower(graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    """Writes one program with a method for each graph; see `export.backends.executorch.lower`."""
    return executorch.lower(graphs, out_dir, DELEGATE)


def _partitioner() -> tuple[Any, list[Any]]:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes

    return XnnpackPartitioner(), get_transform_passes()


def _said(record: logging.LogRecord) -> tuple[str, str] | None:
    said: Any = record.msg
    return None if getattr(said, "node", None) is None else (said.node.name, str(said.reason).rstrip("."))


@contextmanager
def _serialising() -> Iterator[None]:
    with _half_stored(), _needed_patterns():
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


DELEGATE = Delegate(
    name="XnnpackBackend",
    load=_partitioner,
    logger="executorch.backends.xnnpack.partition.config.xnnpack_config",
    said=_said,
    key=lambda node: node.name,
    converts=False,
    serialising=_serialising,
)

XNNPACK = Backend(
    name="xnnpack",
    engine="executorch",
    # Phones since Armv8.2 add float16 products up in 16 bits, which costs tokens (docs/precision.md); in fp32 every
    # processor gives the same, from a file of the same size.
    precisions=("fp32", "fp16"),
    quant_vision=("8da8w",),
    quant_text=("8da4w", "8da4w-g64", "8da4w-g32", "8da8w"),
    packages=("torch", "transformers", "executorch", "torchao"),
    lower=lower,
    one_by_one=True,
    open_axes=True,
)
