"""The pruner alone as a graph that backends take, and how such a graph is opened in its engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.golden_cases import Case, features_of, tensor_of
from export.backends.backend import LoweredGraph
from export.backends.coreml import COREML
from export.backends.onnx import ONNX
from export.backends.qnn import Soc, lower
from export.backends.xnnpack import XNNPACK
from export.graphs.graph import Graph
from pruning import ComparingPruner, TokenPruner
from pruning.vlm_pruner.comparing import WHOLE
from runtime.bundle import DelegateCoverage, GraphInfo, TensorInfo
from runtime.engines import ENGINES, LoadedGraph, qnn

Engine = Literal["coreml", "executorch", "onnxruntime"]


class PrunerGraph(Graph):
    """keys (1, N, Dk), hidden (1, N, D) -> tokens (1, keep, D), indices (1, keep) in the dtype of what it computes."""

    def __init__(self, pruner: TokenPruner | ComparingPruner, *, key_width: int, hidden_width: int) -> None:
        super().__init__()
        self.pruner = pruner
        self.key_width, self.hidden_width = key_width, hidden_width

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Keys and hidden states."""
        tokens = self.pruner.spec.tokens
        return (_info("keys", 1, tokens, self.key_width), _info("hidden", 1, tokens, self.hidden_width))

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Tokens and indices."""
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


class QuantisedFeatures(PrunerGraph):
    """The pruner behind quantised products that hand its inputs on unchanged but for the rounding."""

    quantisable = ("keys_on", "hidden_on")

    def __init__(self, pruner: ComparingPruner, *, key_width: int, hidden_width: int) -> None:
        super().__init__(pruner, key_width=key_width, hidden_width=hidden_width)
        self.keys_on, self.hidden_on = (
            torch.nn.Linear(width, width, bias=False) for width in (key_width, hidden_width)
        )
        for linear in (self.keys_on, self.hidden_on):
            torch.nn.init.eye_(linear.weight)
        self.requires_grad_(False)

    def forward(self, keys: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(self.keys_on(keys), self.hidden_on(hidden))


def opened_on_npu(graph: PrunerGraph, soc: Soc, folder: Path) -> LoadedGraph:
    """The pruner alone, compiled for the chip and opened from disk: every node is on the NPU."""
    written = lower(soc, {"pruner": graph.eval()}, folder)["pruner"]
    (coverage,) = written.coverage
    assert (coverage.delegate, coverage.partitions, coverage.outside) == (qnn.QNN, 1, ())
    assert coverage.nodes > 400
    assert sorted(path.name for path in folder.iterdir()) == ["pruner.onnx", "pruner_qnn.bin"]
    loaded = opened(graph, "pruner", written, "onnxruntime", folder)
    placement = loaded.placement()
    assert (placement.delegates, placement.outside, placement.emulated) == ({qnn.QNN: 1}, {}, True)
    return loaded


def quantised_on_npu(graph: Graph, soc: Soc, folder: Path, calibration: list[tuple[np.ndarray, ...]]) -> LoadedGraph:
    """Quantised, compiled whole for the chip, opened from disk."""
    graph.compression, graph.calibration = "a16w8", calibration
    written = lower(soc, {"g": graph.eval()}, folder)["g"]
    (coverage,) = written.coverage
    assert (coverage.delegate, coverage.partitions, coverage.outside) == (qnn.QNN, 1, ())
    assert sorted(path.name for path in folder.iterdir()) == ["g.onnx", "g_qnn.bin"]
    loaded = opened(graph, "g", written, "onnxruntime", folder)
    placement = loaded.placement()
    assert (placement.delegates, placement.outside, placement.emulated) == ({qnn.QNN: 1}, {}, True)
    return loaded


def kept_share(case: Case, loaded: LoadedGraph) -> float:
    """Share of the authors' kept tokens that an open pruner keeps, which it gives in ascending order."""
    kept = np.rint(loaded.run([one.numpy() for one in features_of(case.features)])[1][0]).astype(int)
    assert bool((np.diff(kept) > 0).all())
    return float(np.isin(tensor_of(f"{case.name}.indices").numpy(), kept).mean())
