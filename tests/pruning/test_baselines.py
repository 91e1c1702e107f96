"""The baselines, which look at no token: evenly spaced ones, drawn ones, and means of cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pruning import METHODS, Features, PruneSpec
from pruning.random_tokens import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


def _kept(method: str, grid: tuple[int, int], keep: int, *, settings: object = None) -> list[int]:
    spec = PruneSpec(grid=grid, keep=keep, method=method, settings=settings)
    features = Features(hidden=torch.zeros(1, spec.tokens, 2))
    indices: list[int] = METHODS[method].choose(features, spec).indices[0].tolist()
    return indices


def test_uniform_keeps_the_middles_of_equal_stretches() -> None:
    assert _kept("uniform", (4, 4), 1) == [8]
    assert _kept("uniform", (4, 4), 4) == [2, 6, 10, 14]
    assert _kept("uniform", (2, 5), 3) == [1, 5, 8]
    assert _kept("uniform", (2, 5), 10) == list(range(10))
    kept = _kept("uniform", (24, 24), 64)
    assert set(np.diff(kept).tolist()) == {9}


@pytest.mark.parametrize("method", ["uniform", "random", "pool"])
def test_more_tokens_are_named_than_float16_counts(method: str) -> None:
    spec = PruneSpec(grid=(46, 45), keep=2070, method=method)
    features = Features(hidden=torch.randn(1, spec.tokens, 2, generator=torch.Generator().manual_seed(0)))
    program = torch.export.export(METHODS[method].module(spec, "float16"), (features,), strict=False)
    _, indices, _ = program.module()(features)
    assert indices.dtype == torch.int32
    assert indices[0].tolist() == list(range(2070))


def test_chance_draws_the_same_tokens_everywhere() -> None:
    """The numbers are written down: a bundle made elsewhere keeps the same ones."""
    assert _kept("random", (4, 4), 5) == [3, 5, 7, 12, 15]
    assert _kept("random", (4, 4), 5, settings=Settings(seed=1)) != [3, 5, 7, 12, 15]


def test_chance_adds_tokens_and_takes_none_back() -> None:
    for keep in range(1, 35):
        assert set(_kept("random", (5, 7), keep)) < set(_kept("random", (5, 7), keep + 1))


def test_chance_favours_no_token() -> None:
    """Each of 24 tokens is kept in about a quarter of the draws; 5 standard deviations are far beyond chance."""
    draws = 2000
    kept = [_kept("random", (4, 6), 6, settings=Settings(seed=seed)) for seed in range(draws)]
    counts = np.bincount(np.concatenate(kept), minlength=24)
    assert np.abs(counts - draws / 4).max() < 5 * math.sqrt(draws * 0.25 * 0.75)


def test_pooling_by_whole_numbers_is_plain_average_pooling() -> None:
    spec = PruneSpec(grid=(12, 6), keep=8, method="pool")
    hidden = torch.randn(2, 72, 5, generator=torch.Generator().manual_seed(0))
    trace = METHODS["pool"].choose(Features(hidden=hidden), spec)
    expected = hidden.numpy().reshape(2, 4, 3, 2, 3, 5).mean(axis=(2, 4)).reshape(2, 8, 5)
    np.testing.assert_allclose(trace.tokens.numpy(), expected, atol=1e-6)
    assert trace.indices[0].tolist() == [row * 6 + column for row in (1, 4, 7, 10) for column in (1, 4)]


@pytest.mark.parametrize("grid", [(24, 24), (7, 3), (2, 11), (1, 5), (5, 1)], ids=str)
def test_cells_cover_every_token_once_and_are_about_equal(grid: tuple[int, int]) -> None:
    count = grid[0] * grid[1]
    for keep in range(1, count + 1, 1 if count < 100 else 37):
        spec = PruneSpec(grid=grid, keep=keep, method="pool")
        mix = METHODS["pool"].choose(Features(hidden=torch.zeros(1, count, 1)), spec).mix
        assert mix is not None
        sizes = (mix[0] > 0).sum(1)
        assert torch.equal((mix[0] > 0).sum(0), torch.ones(count, dtype=torch.int64)), "each token in one cell"
        torch.testing.assert_close(mix[0].sum(1), torch.ones(keep))
        assert int(sizes.max()) <= 4 * max(1, count // keep), "no cell is much larger than a fair share"


@pytest.mark.parametrize(
    ("keep", "bands"), [(64, [8] * 8), (144, [12] * 12), (61, [7, 8, 7, 8, 8, 7, 8, 8]), (5, [2, 3])]
)
def test_cells_are_as_square_as_they_go(keep: int, bands: list[int]) -> None:
    rows = [token // 24 for token in _kept("pool", (24, 24), keep)]
    assert sorted(np.unique(rows, return_counts=True)[1].tolist()) == sorted(bands)
