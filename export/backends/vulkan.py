"""Graphs for phone GPUs: ExecuTorch programs lowered to its Vulkan delegate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends import executorch
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
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner

    return VulkanPartitioner(), []


def _said(record: logging.LogRecord) -> tuple[str, str] | None:
    reason, skipping, node = record.getMessage().partition("], skipping ")
    if not skipping:
        return None
    # Behind these words comes the node once more.
    return node, reason.partition("Due to [")[2].partition(" for op ")[0]


def _key(node: torch.fx.Node) -> str:
    from executorch.backends.vulkan.utils import node_io_str

    return str(node_io_str(node))


# Its partitioner speaks through the root logger.
DELEGATE = Delegate(name="VulkanBackend", load=_partitioner, logger="", said=_said, key=_key, converts=True)


VULKAN = Backend(
    name="vulkan",
    engine="executorch",
    precisions=("fp32", "fp16"),
    quant_vision=(),
    quant_text=(),
    packages=("torch", "transformers", "executorch"),
    lower=lower,
    one_by_one=True,
)
