"""The pruner alone as a graph that backends take: keys and hidden states in, tokens and indices out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from export.backends.backend import LoweredGraph
from export.backends.coreml import COREML
from export.backends.onnx import ONNX
from export.backends.xnnpack import XNNPACK
from export.graphs.graph import Graph
from pruning import ComparingPruner, TokenPruner
from pruning.vlm_pruner.comparing import WHOLE
from runtime.bundle import DelegateCoverage, GraphInfo, TensorInfo
from runtime.engines import ENGINES, LoadedGraph

Engine = Literal["coreml", "executorch", "onnxruntime"]


class PrunerGraph(Graph):
    """keys (1, N, Dk), hidden (1, N, D) -> tokens (1, keep, D), indices (1, keep) in the dtype of what it computes."""

    def __init__(self, pruner: TokenPruner | ComparingPruner, *, key_width: int, hidden_width: int) -> None:
        super().__init__()
        self.pruner = pruner
        self.key_width, self.hidden_width = key_width, hidden_width

    def input_infos(self) -> tuple[TensorInfo, ...]:
        tokens = self.pruner.spec.tokens
        return (_info("keys", 1, tokens, self.key_width), _info("hidden", 1, tokens, self.hidden_width))

    def output_infos(self) -> tuple[TensorInfo, ...]:
        keep = self.pruner.spec.keep
        whole = isinstance(self.pruner, ComparingPruner) and self.pruner.spec.tokens > WHOLE
        indices = TensorInfo(name="indices", shape=(1, keep), dtype="int32" if whole else "float32")
        return (_info("tokens", 1, keep, self.hidden_width), indices)

    def forward(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        tokens, indices = self.pruner(keys, hidden)
        return tokens, indices


def _info(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name=name, shape=shape, dtype="float32")


def lowered(graph: PrunerGraph, engine: Engine, folder: Path) -> tuple[DelegateCoverage, LoadedGraph]:
    """Lowered into `folder` and opened from there in its engine."""
    backend = {"coreml": COREML, "executorch": XNNPACK, "onnxruntime": ONNX}[engine]
    written = backend.lower({"pruner": graph.eval()}, folder)["pruner"]
    (coverage,) = written.coverage
    return coverage, opened(graph, "pruner", written, engine, folder)


def opened(
    graph: Graph, name: str, written: LoweredGraph, engine: Engine, folder: Path, *, threads: int = 2
) -> LoadedGraph:
    """What was written for a graph into `folder`, opened in its engine."""
    info = GraphInfo(
        name=name,
        file=written.file,
        extra_files=written.extra_files,
        engine=engine,
        arithmetic=("fp32",),
        inputs=written.inputs or graph.input_infos(),
        outputs=written.outputs or graph.output_infos(),
        states=written.states,
        coverage=written.coverage,
    )
    return ENGINES[engine](info, folder / written.file, tuple(folder / file for file in written.extra_files), threads)
