"""The pruner alone stays whole in every delegate: XNNPACK and ONNX Runtime run it, Vulkan and Core ML only take it."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from operator import getitem
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.pruner_alone import Engine, PrunerGraph, lowered
from pruning import PruneSpec, TokenPruner, reference
from pruning.vlm_pruner.settings import Settings

# Converting takes from half a minute to several, depending on what else the machine does.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# Few steps keep the graph small; every stage is in it, the choice of channels included (there are more of them).
SMALL = PruneSpec(grid=(8, 8), keep=16, settings=Settings(token_batch=4, channels=24, steps=8))
KEY_WIDTH, HIDDEN_WIDTH = 20, 40
FULL = PruneSpec(grid=(24, 24), keep=64)
FEWEST = PruneSpec(grid=(6, 6), keep=1, settings=Settings(channels=24))

# What Core ML's converter makes of the graph: arithmetic, matrix products and reshapes. Anything that sorts, gathers,
# scatters or selects would leave the Neural Engine.
CORE_ML_OPERATORS = {
    "abs",
    "add",
    "clip",
    "concat",
    "const",
    "matmul",
    "max_pool",
    "minimum",
    "mul",
    "pad",
    "real_div",
    "reshape",
    "slice_by_index",
    "softmax",
    "sqrt",
    "sub",
    "transpose",
}


def _features(spec: PruneSpec, key_width: int, hidden_width: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Five centres under noise, so that neither the first pass nor the pivots decide everything."""
    chance = torch.Generator().manual_seed(seed)
    centre = torch.randn(5, hidden_width, generator=chance)
    near = torch.randint(0, 5, (spec.tokens,), generator=chance)
    keys = torch.randn(1, spec.tokens, key_width, generator=chance)
    return keys, centre[near][None] + 0.9 * torch.randn(1, spec.tokens, hidden_width, generator=chance)


@pytest.fixture
def _converters_may_warn() -> Iterator[None]:
    """Converters warn about versions and deprecations of their own dependencies, which nobody here can act on."""
    level = logging.root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.root.setLevel(level)


def _exported(spec: PruneSpec, key_width: int, hidden_width: int) -> torch.export.ExportedProgram:
    with torch.no_grad():
        inputs = _features(spec, key_width, hidden_width, seed=0)
        return torch.export.export(TokenPruner(spec).eval(), inputs, strict=False)


def _assert_whole_and_exact(
    spec: PruneSpec, engine: Engine, folder: Path, *, key_width: int, hidden_width: int
) -> None:
    """Lowered, loaded from disk and run: one partition, nothing outside, and the reference's answers."""
    graph = PrunerGraph(TokenPruner(spec), key_width=key_width, hidden_width=hidden_width)
    coverage, loaded = lowered(graph, engine, folder)
    assert (coverage.partitions, coverage.outside) == (1, ())
    assert coverage.nodes > 100
    if engine == "executorch":
        assert loaded.placement().delegates == {"XnnpackBackend": 1}
        assert loaded.placement().outside == {}
    for seed in range(3):  # the first is what the graph was traced with
        keys, hidden = _features(spec, key_width, hidden_width, seed=seed)
        with torch.no_grad():
            filled = TokenPruner(spec).select(keys, hidden)[2]
        assert filled.item() == 0.0, "the test's own spec has too few steps"
        expected_tokens, expected_indices = reference.prune(keys, hidden, spec)
        tokens, indices = loaded.run([keys.numpy(), hidden.numpy()])
        np.testing.assert_array_equal(indices, expected_indices.numpy())
        np.testing.assert_allclose(tokens, expected_tokens.numpy(), rtol=0.0, atol=1e-4)
    loaded.close()


@pytest.mark.parametrize("engine", ["onnxruntime", "executorch"])
def test_small_grid_runs_whole(engine: Engine, tmp_path: Path) -> None:
    _assert_whole_and_exact(SMALL, engine, tmp_path, key_width=KEY_WIDTH, hidden_width=HIDDEN_WIDTH)


@pytest.mark.parametrize("engine", ["onnxruntime", "executorch"])
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_few_tokens_run_whole(engine: Engine, keep: int, tmp_path: Path) -> None:
    """No more than the pivots: no step follows them."""
    spec = PruneSpec(grid=(6, 6), keep=keep, settings=Settings(channels=12))
    _assert_whole_and_exact(spec, engine, tmp_path, key_width=8, hidden_width=20)


def test_full_grid_runs_whole_in_xnnpack(tmp_path: Path) -> None:
    _assert_whole_and_exact(FULL, "executorch", tmp_path, key_width=128, hidden_width=288)


@pytest.mark.usefixtures("_converters_may_warn")
@pytest.mark.parametrize("spec", [SMALL, FEWEST], ids=["some", "fewest"])
def test_vulkan_takes_everything(spec: PruneSpec) -> None:
    """Lowered only: Vulkan's runtime needs a device with its driver."""
    from executorch.backends.vulkan.partitioner.vulkan_partitioner import VulkanPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from executorch.exir.delegate import executorch_call_delegate

    edge = to_edge_transform_and_lower(
        _exported(spec, KEY_WIDTH, HIDDEN_WIDTH),
        partitioner=[VulkanPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    calls = Counter(
        node.target
        for node in edge.exported_program().graph.nodes
        if node.op == "call_function" and node.target is not getitem
    )
    assert calls == {executorch_call_delegate: 1}
    assert len(edge.to_executorch().buffer) > 10_000


@pytest.mark.usefixtures("_converters_may_warn")
def test_core_ml_takes_everything() -> None:
    """Converted only: Core ML runs on Apple's systems."""
    import coremltools as ct

    program = _exported(SMALL, KEY_WIDTH, HIDDEN_WIDTH).run_decompositions({})
    model = ct.convert(
        program,
        minimum_deployment_target=ct.target.iOS18,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    operators = Counter(
        operation.type
        for function in model.get_spec().mlProgram.functions.values()
        for block in function.block_specializations.values()
        for operation in block.operations
    )
    assert operators["matmul"] > 10
    assert set(operators) <= CORE_ML_OPERATORS
    description = model.get_spec().description
    shapes = [tuple(item.type.multiArrayType.shape) for item in (*description.input, *description.output)]
    assert shapes == [(1, 64, KEY_WIDTH), (1, 64, HIDDEN_WIDTH), (1, 16, HIDDEN_WIDTH), (1, 16)]
