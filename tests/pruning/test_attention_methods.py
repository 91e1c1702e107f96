"""VisionZip, HoloV and FastV against formulas written anew in numpy, and what is said of them beside the contract."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pruning import METHODS, Features, Kept, PruneSpec, SpecError
from pruning.holov import Settings as Quotas
from pruning.visionzip import Settings as Split

pytestmark = pytest.mark.usefixtures("one_thread")

quick = settings(max_examples=40, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(2, 7), st.integers(2, 7), st.floats(0.05, 1.0), st.integers(0, 2**31))
Numbers = NDArray[np.float64]


def _features(count: int, seed: int) -> Features:
    chance = torch.Generator().manual_seed(seed)
    return Features(
        hidden=torch.randn(1, count, 24, generator=chance),
        keys=torch.randn(1, count, 10, generator=chance),
        attention=(2.0 * torch.randn(1, count, generator=chance)).softmax(-1),
        question=torch.randn(1, 3, 24, generator=chance),
    )


def _numbers(x: torch.Tensor | None) -> Numbers:
    assert x is not None
    return x[0].double().numpy()


def _cosines(rows: Numbers) -> Numbers:
    length = np.sqrt(np.einsum("id,id->i", rows, rows))
    return np.asarray(np.einsum("id,jd->ij", rows, rows) / np.outer(length, length))


def _agreed(spec: PruneSpec, features: Features) -> tuple[list[int], Numbers]:
    """Positions and tokens that both forms give."""
    method = METHODS[spec.method]
    trace = method.choose(features, spec)
    with torch.no_grad():
        kept: Kept = method.module(spec, "float32")(features)
    assert torch.equal(kept.indices, trace.indices)
    torch.testing.assert_close(kept.tokens, trace.tokens, rtol=0.0, atol=1e-4)
    return trace.indices[0].tolist(), _numbers(trace.tokens)


@quick
@given(shape=shapes, contextual=st.sampled_from([0.0, 10 / 64, 0.5, 1.0]))
def test_visionzip_keeps_what_is_looked_at_and_averages_the_rest(
    shape: tuple[int, int, float, int], contextual: float
) -> None:
    rows, columns, share, seed = shape
    count = rows * columns
    keep = max(1, round(share * count))
    features = _features(count, seed)
    hidden, attention, cosines = (
        _numbers(features.hidden),
        _numbers(features.attention),
        _cosines(_numbers(features.keys)),
    )
    targets = round(contextual * keep)
    ranked = np.argsort(-attention, kind="stable")
    made = {int(token): hidden[token] for token in ranked[: keep - targets]}
    rest = np.sort(ranked[keep - targets :])
    standing = [int(rest[at * (len(rest) // targets)]) for at in range(targets)]
    groups: dict[int, list[int]] = {token: [token] for token in standing}
    for token in sorted(set(rest.tolist()) - set(standing)):
        if standing:
            groups[max(standing, key=lambda target: cosines[token, target])].append(token)
    made |= {target: hidden[members].mean(axis=0) for target, members in groups.items()}
    spec = PruneSpec(grid=(rows, columns), keep=keep, method="visionzip", settings=Split(contextual=contextual))
    indices, tokens = _agreed(spec, features)
    assert indices == sorted(made)
    np.testing.assert_allclose(tokens, np.stack([made[index] for index in indices]), atol=1e-5)
    assert METHODS["visionzip"].choose(features, spec).marks[0].tolist() == standing


@pytest.mark.parametrize(("keep", "targets"), [(64, 10), (128, 20), (192, 30), (1, 0)])
def test_visionzip_splits_as_the_paper_does(keep: int, targets: int) -> None:
    assert Split().targets(keep) == targets


def _holov(features: Features, keep: int, crops: int, weight: float) -> list[int]:
    """Quotas by largest remainders as the code has them, then the best of each crop, then the best of all."""
    hidden, attention = _numbers(features.hidden), _numbers(features.attention) * features.hidden.shape[1]
    parts = np.array_split(np.arange(len(attention)), min(crops, len(attention)))
    score = np.zeros(len(attention))
    for part in parts:
        spread = np.zeros(len(part))
        for at in range(len(part)):
            if len(part) > 1:
                row = _cosines(hidden[part])[at]
                row[at] = 0.0
                spread[at] = ((row - row.sum() / (len(part) - 1)) ** 2).sum() / (len(part) - 1)
        score[part] = attention[part] + weight * spread * attention[part].mean() / (spread.mean() + 1e-6)
    means = np.array([score[part].mean() for part in parts])
    quotas = np.floor(means / means.sum() * keep + 2.0**-10).astype(int)
    quotas[np.argsort(-means, kind="stable")[: keep - quotas.sum()]] += 1
    kept: set[int] = set()
    for part, quota in zip(parts, quotas, strict=True):
        kept |= set(part[np.argsort(-score[part], kind="stable")][:quota].tolist())
    left = [token for token in np.argsort(-score, kind="stable").tolist() if token not in kept]
    return sorted(kept | set(left[: keep - len(kept)]))


@quick
@given(shape=shapes, crops=st.integers(1, 20), weight=st.sampled_from([0.0, 0.09, 3.0]))
def test_holov_gives_each_crop_its_quota(shape: tuple[int, int, float, int], crops: int, weight: float) -> None:
    rows, columns, share, seed = shape
    count = rows * columns
    keep = max(1, round(share * count))
    features = _features(count, seed)
    spec = PruneSpec(
        grid=(rows, columns), keep=keep, method="holov", settings=Quotas(crops=crops, variance_weight=weight)
    )
    assert _agreed(spec, features)[0] == _holov(features, keep, crops, weight)


def test_holov_leaves_no_crop_out_where_attention_is_even() -> None:
    features = _features(144, 0)._replace(attention=torch.full((1, 144), 1.0 / 144))
    spec = PruneSpec(grid=(12, 12), keep=32, method="holov", settings=Quotas(variance_weight=0.0))
    kept = np.array(_agreed(spec, features)[0])
    assert np.bincount(kept // 9, minlength=16).tolist() == [2] * 16


def test_holov_fills_up_where_one_crop_gets_more_than_it_holds() -> None:
    attention = torch.full((1, 36), 1e-6)
    attention[0, :6] = 0.16
    spec = PruneSpec(grid=(6, 6), keep=20, method="holov", settings=Quotas(crops=6))
    kept = _agreed(spec, _features(36, 1)._replace(attention=attention))[0]
    assert kept[:6] == list(range(6))
    assert len(kept) == 20


def test_fastv_follows_the_question_and_has_no_static_form() -> None:
    spec, features = PruneSpec(grid=(4, 5), keep=6, method="fastv"), _features(20, 0)
    trace = METHODS["fastv"].choose(features, spec)
    ranked = np.argsort(-_numbers(features.attention), kind="stable")[:6]
    assert trace.order[0].tolist() == ranked.tolist()
    assert METHODS["fastv"].arithmetics == ()
    with pytest.raises(SpecError, match="'fastv' chooses by the question, and a graph of the image has none"):
        METHODS["fastv"].module(spec, "float32")


@pytest.mark.parametrize("method", ["visionzip", "holov"])
def test_attention_is_the_towers(method: str) -> None:
    """In the decoder the last token that looks at the image is the question's, which nobody has asked yet."""
    assert METHODS[method].cuts.allow(0)
    assert not METHODS[method].cuts.allow(1)
