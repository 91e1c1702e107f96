"""Every method's static form stays whole in each delegate; ONNX Runtime and XNNPACK run it, Core ML only takes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.pruner_alone import Engine, opened
from export.backends.backend import Backend
from export.backends.coreml import COREML
from export.backends.onnx import ONNX
from export.backends.xnnpack import XNNPACK
from export.graphs.graph import Graph
from pruning import METHODS, Features, Method, PruneSpec
from runtime.bundle import TensorInfo

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = {"hidden": 40, "keys": 20}
# Few tokens keep the graphs small; what repeats for each token to keep repeats often enough.
SMALL = ((5, 5), 7)
methods = pytest.mark.parametrize(
    "method",
    [
        # The whole of VLM-Pruner has tests of its own; its parts are graphs as long, which take as long to lower.
        pytest.param(method, id=name, marks=[pytest.mark.slow] if name.startswith("vlm-pruner-") else [])
        for name, method in METHODS.items()
        if "float32" in method.arithmetics and name != "vlm-pruner"
    ],
)


class MethodGraph(Graph):
    """What a method needs -> tokens (1, keep, D), indices (1, keep), both float32."""

    def __init__(self, method: Method, spec: PruneSpec) -> None:
        super().__init__()
        self.spec, self.module = spec, method.module(spec, "float32")
        self.names = tuple(name for name in Features._fields if name == "hidden" or name in method.needs)

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """What the method looks at."""
        return tuple(
            TensorInfo(name=name, shape=tuple(x.shape), dtype="float32")
            for name, x in zip(self.names, self.features(seed=0), strict=True)
        )

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Tokens and their positions."""
        keep = self.spec.keep
        shapes = {"tokens": (1, keep, WIDTHS["hidden"]), "indices": (1, keep)}
        return tuple(TensorInfo(name=name, shape=shape, dtype="float32") for name, shape in shapes.items())

    def features(self, *, seed: int) -> list[Tensor]:
        """Random features, in the order of the inputs."""
        chance = torch.Generator().manual_seed(seed)
        count = self.spec.tokens
        made = {name: torch.randn(1, count, width, generator=chance) for name, width in WIDTHS.items()}
        made["attention"] = (2.0 * torch.randn(1, count, generator=chance)).softmax(-1)
        return [made[name] for name in self.names]

    def forward(self, *features: Tensor) -> tuple[Tensor, Tensor]:
        tokens, indices, _ = self.module(Features(**dict(zip(self.names, features, strict=True))))
        # A delegate hands no constant on.
        return tokens, indices + tokens[:, :, :1].view(1, -1) * 0.0


def _assert_whole(
    method: Method, shape: tuple[tuple[int, int], int], backend: Backend, engine: Engine, folder: Path
) -> None:
    spec = PruneSpec(grid=shape[0], keep=shape[1], method=method.name)
    graph = MethodGraph(method, spec)
    written = backend.lower({"pruner": graph.eval()}, folder)["pruner"]
    (coverage,) = written.coverage
    assert (coverage.partitions, coverage.outside) == (1, ())
    loaded = opened(graph, "pruner", written, engine, folder)
    for seed in range(3):
        given = graph.features(seed=seed)
        expected = method.choose(Features(**dict(zip(graph.names, given, strict=True))), spec)
        tokens, indices = loaded.run([x.numpy() for x in given])
        np.testing.assert_array_equal(indices, expected.indices.numpy())
        np.testing.assert_allclose(tokens, expected.tokens.numpy(), rtol=0.0, atol=1e-4)
    loaded.close()


@methods
def test_onnx_runtime_runs_it_whole(method: Method, tmp_path: Path) -> None:
    _assert_whole(method, SMALL, ONNX, "onnxruntime", tmp_path)


@methods
def test_xnnpack_runs_it_whole(method: Method, tmp_path: Path) -> None:
    _assert_whole(method, SMALL, XNNPACK, "executorch", tmp_path)


@methods
def test_core_ml_takes_it_whole(method: Method, tmp_path: Path) -> None:
    _assert_whole(method, SMALL, COREML, "coreml", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("backend", "engine"), [(ONNX, "onnxruntime"), (XNNPACK, "executorch")], ids=["onnx", "xnnpack"]
)
@methods
def test_the_full_grid_runs_whole(method: Method, backend: Backend, engine: Engine, tmp_path: Path) -> None:
    _assert_whole(method, ((24, 24), 64), backend, engine, tmp_path)
