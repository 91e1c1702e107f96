"""DivPrune, DART and our own method against formulas written anew in numpy, and what is said beside the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pruning import METHODS, Features, PruneSpec, SpecError
from pruning.dart import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

quick = settings(max_examples=40, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(2, 7), st.integers(2, 7), st.floats(0.05, 1.0), st.integers(0, 2**31))


def _features(count: int, seed: int) -> Features:
    """Tokens about five centres, so that some are much more alike than others."""
    chance = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, 24, generator=chance)[torch.randint(0, 5, (count,), generator=chance)]
    return Features(
        hidden=(centres + 0.6 * torch.randn(count, 24, generator=chance))[None],
        keys=torch.randn(1, count, 10, generator=chance),
    )


def _cosines(features: Features) -> NDArray[np.float64]:
    hidden = features.hidden[0].double().numpy()
    products = np.einsum("id,jd->ij", hidden, hidden)
    return np.asarray(products / np.sqrt(np.outer(products.diagonal(), products.diagonal())))


def _kept(spec: PruneSpec, features: Features) -> list[int]:
    """What both forms keep."""
    method = METHODS[spec.method]
    kept: list[int] = method.choose(features, spec).indices[0].tolist()
    with torch.no_grad():
        assert method.module(spec, "float32")(features).indices[0].tolist() == kept
    return kept


@quick
@given(shape=shapes)
def test_divprune_adds_what_is_least_similar_to_all_so_far(shape: tuple[int, int, float, int]) -> None:
    rows, columns, share, seed = shape
    count = rows * columns
    keep = max(1, round(share * count))
    features = _features(count, seed)
    cosines = _cosines(features)
    others = np.where(np.eye(count, dtype=bool), -np.inf, cosines)
    chosen = [int(np.argmin(others.max(axis=0)))]
    for _ in range(keep - 1):
        left = [token for token in range(count) if token not in chosen]
        chosen.append(min(left, key=lambda token: cosines[token, chosen].max()))
    spec = PruneSpec(grid=(rows, columns), keep=keep, method="divprune")
    assert _kept(spec, features) == sorted(chosen)
    trace = METHODS["divprune"].choose(features, spec)
    assert trace.order[0].tolist() == chosen
    assert trace.recovery is not None
    np.testing.assert_allclose(trace.recovery.similarity[0].numpy(), cosines, atol=2e-6)


@quick
@given(shape=shapes)
def test_standout_weighs_distance_and_recovers(shape: tuple[int, int, float, int]) -> None:
    rows, columns, share, seed = shape
    count = rows * columns
    keep = max(1, round(share * count))
    features = _features(count, seed)
    hidden, cosines = features.hidden[0].double().numpy(), _cosines(features)
    away = np.linalg.norm(hidden - hidden.mean(0), axis=1)
    weight = np.sqrt(away / away.mean())
    chosen = [int(np.argmax(weight))]
    for _ in range(keep - 1):
        left = [token for token in range(count) if token not in chosen]
        chosen.append(max(left, key=lambda token: weight[token] * (1 - cosines[token, chosen].max())))
    spec = PruneSpec(grid=(rows, columns), keep=keep, method="standout")
    kept = _kept(spec, features)
    assert kept == sorted(chosen)
    trace = METHODS["standout"].choose(features, spec)
    assert trace.order[0].tolist() == chosen
    expected = []
    for own in kept:
        stood = [t for t in range(count) if t not in kept and kept[int(np.argmax(cosines[t, kept]))] == own]
        by = cosines[stood, own]
        if by.sum() > 2.0**-10 * np.abs(by).sum():
            expected.append(0.5 * hidden[own] + 0.5 * (by @ hidden[stood]) / by.sum())
        else:
            expected.append(hidden[own])
    np.testing.assert_allclose(trace.tokens[0].numpy(), np.array(expected), rtol=2e-4, atol=2e-4)
    with torch.no_grad():
        tokens = METHODS["standout"].module(spec, "float32")(features).tokens[0]
    torch.testing.assert_close(tokens, trace.tokens[0], rtol=1e-4, atol=1e-4)


def test_divprune_keeps_one_of_each_kind_before_a_second() -> None:
    """Seven directions at right angles, many copies of each."""
    kinds = torch.arange(42) * 5 % 7
    features = Features(
        hidden=torch.eye(7)[kinds][None] * torch.rand(42, 1, generator=torch.Generator().manual_seed(0))
    )
    kept = _kept(PruneSpec(grid=(6, 7), keep=7, method="divprune"), features)
    assert sorted(kinds[kept].tolist()) == list(range(7))


@quick
@given(shape=shapes, pivots=st.integers(1, 6))
def test_dart_lets_each_pivot_add_its_share_of_what_is_least_like_it(
    shape: tuple[int, int, float, int], pivots: int
) -> None:
    rows, columns, share, seed = shape
    count = rows * columns
    keep = max(1, round(share * count))
    features = _features(count, seed)
    assert features.keys is not None
    cosines = _cosines(features)
    first = np.argsort(-np.abs(features.keys[0].double().numpy()).sum(axis=1), kind="stable")[: min(pivots, keep)]
    kept = set(first.tolist())
    sizes = [len(part) for part in np.array_split(np.arange(keep - len(first)), len(first))]
    for pivot, size in zip(first, sizes, strict=True):
        left = sorted(set(range(count)) - kept, key=lambda token: cosines[pivot, token])
        kept |= set(left[:size])
    spec = PruneSpec(grid=(rows, columns), keep=keep, method="dart", settings=Settings(pivots=pivots))
    assert _kept(spec, features) == sorted(kept)
    assert METHODS["dart"].choose(features, spec).marks[0].tolist() == first.tolist()


def test_dart_has_four_pivots_of_the_image_which_share_the_tokens_out() -> None:
    assert Settings().shares(64) == [15, 15, 15, 15]
    assert Settings().shares(10) == [2, 2, 1, 1]
    assert Settings().shares(3) == [0, 0, 0]
    assert not METHODS["dart"].cuts.allow(0), "behind the projector no decoder layer has made keys"


def test_wide_features_are_refused() -> None:
    spec = PruneSpec(grid=(1, 2), keep=1, method="divprune")
    with pytest.raises(SpecError, match="hidden is 16385 wide; the static pruner covers at most 16384 channels"):
        METHODS["divprune"].module(spec, "float32")(Features(hidden=torch.zeros(1, 2, 16385)))
