"""The metrics, the bounds, and what happens when an engine keeps other tokens than the desktop did."""

from __future__ import annotations

import math
from typing import Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.bundle import GraphInfo, Manifest, PruneInfo
from runtime.check.parity import (
    BOUNDS,
    Divergence,
    GraphParity,
    bound_for,
    compare,
    compare_answer,
    compare_kept,
    graph_parity,
    text_parity,
)
from runtime.errors import BundleError
from tests.sample_bundle import PREFIX, VISION, Arrays, Sample, fill, make_golden, noise_photo

FP32, FP16, INT8 = BOUNDS["fp32"], BOUNDS["fp16"], BOUNDS["8da8w"]


def _noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _off_by(expected: np.ndarray, rel: float, seed: int = 1) -> np.ndarray:
    """`expected` with noise of exactly this relative norm."""
    noise = _noise(expected.shape, seed).astype(np.float64)
    return np.asarray(expected + noise * (rel * np.linalg.norm(expected) / np.linalg.norm(noise)))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return fill(tmp_path_factory.mktemp("b"), "b", Sample(), noise_photo())


# Metrics


def test_metrics_by_hand() -> None:
    result = compare("x", np.array([[3.0, -4.0]]), np.array([[3.0, -3.0]]), bound=INT8)
    assert result.max_abs == 1
    assert result.rel == pytest.approx(1 / 5)
    assert result.psnr_db == pytest.approx(20 * math.log10(4 / math.sqrt(0.5)))
    assert result.cosine == pytest.approx((9 + 12) / (5 * math.sqrt(18)))
    assert not result.passed, "a cosine of 0.9899 lies under the bound of 0.99"


def test_identical() -> None:
    result = compare("x", _noise((3, 4)), _noise((3, 4)), bound=FP32)
    assert (result.max_abs, result.rel, result.psnr_db) == (0, 0, None)
    assert result.cosine == pytest.approx(1)
    assert result.passed


@pytest.mark.parametrize("rel", [1e-7, 1e-5, 1e-3, 0.1])
def test_rel_and_psnr_of_known_noise(rel: float) -> None:
    expected = _noise((1, 64, 32))
    result = compare("x", expected, _off_by(expected, rel), bound=FP32)
    assert result.rel == pytest.approx(rel, rel=1e-3)
    rmse = rel * np.linalg.norm(expected) / math.sqrt(expected.size)
    assert result.psnr_db == pytest.approx(20 * math.log10(np.abs(expected).max() / rmse), abs=1e-2)


@pytest.mark.parametrize(
    ("bound", "passes", "fails"), [(FP32, 1e-5, 4e-5), (FP16, 4e-3, 6e-3), (INT8, 0.1, 0.2)], ids=lambda b: str(b)[:20]
)
def test_bounds_bite(bound: object, passes: float, fails: float) -> None:
    expected = _noise((1, 64, 32))
    chosen = next(entry for entry in BOUNDS.values() if entry is bound)
    assert compare("x", expected, _off_by(expected, passes), bound=chosen).passed
    assert not compare("x", expected, _off_by(expected, fails), bound=chosen).passed


def test_wrong_scale_and_wrong_sign_never_pass() -> None:
    expected = _noise((8, 8))
    for bound in BOUNDS.values():
        assert not compare("x", expected, -expected, bound=bound).passed
    for bound in (FP32, FP16):
        assert not compare("x", expected, expected * 1.01, bound=bound).passed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_never_pass(bad: float) -> None:
    got = _noise((2, 3))
    got[1, 2] = bad
    for bound in BOUNDS.values():
        result = compare("x", _noise((2, 3)), got, bound=bound)
        assert not result.passed
        assert result.note == "1 values of the graph are NaN or infinite"
        assert compare("x", got, got, bound=bound).passed is False
    msgspec.json.encode(result)


def test_integers_must_be_equal() -> None:
    assert compare("ids", np.arange(4), np.arange(4), bound=INT8).passed
    result = compare("ids", np.arange(4), np.array([0, 1, 2, 4]), bound=INT8)
    assert not result.passed
    assert result.bound == "equal"


def test_zeros() -> None:
    zeros = np.zeros((2, 2), np.float32)
    assert compare("x", zeros, zeros, bound=FP32).cosine == 1
    result = compare("x", zeros, zeros + 1, bound=FP32)
    assert not result.passed
    assert math.isfinite(result.rel or math.nan)
    msgspec.json.encode(result)


def test_fp16_overflow_of_the_metric_itself() -> None:
    """Squares of fp16 values beyond 256 overflow in fp16; the metrics are taken in float64."""
    expected = np.full((4, 4), 6e4, np.float16)
    result = compare("x", expected, expected, bound=FP16)
    assert result.passed
    assert result.cosine == pytest.approx(1)


def test_wrong_shape() -> None:
    with pytest.raises(BundleError, match="the golden has the shape"):
        compare("x", np.zeros((2, 3)), np.zeros((3, 2)), bound=FP32)


finite = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@given(st.lists(finite, min_size=1, max_size=20), st.lists(finite, min_size=20, max_size=20))
def test_metrics_are_always_numbers_json_can_hold(expected: list[float], other: list[float]) -> None:
    result = compare("x", np.array(expected), np.array(other[: len(expected)]), bound=FP32)
    assert msgspec.json.decode(msgspec.json.encode(result), type=type(result)) == result
    assert result.cosine is not None
    assert -1 - 1e-9 <= result.cosine <= 1 + 1e-9


@given(st.integers(1, 1000))
def test_scaling_both_sides_changes_nothing_relative(scale: int) -> None:
    expected, got = _noise((4, 5)).astype(np.float64), _noise((4, 5), 1).astype(np.float64)
    a = compare("x", expected, got, bound=FP32)
    b = compare("x", expected * scale, got * scale, bound=FP32)
    assert (a.rel, a.psnr_db, a.cosine) == pytest.approx((b.rel, b.psnr_db, b.cosine))


# Bounds


def test_every_bound_gives_its_reason_and_judges_something() -> None:
    for name, bound in BOUNDS.items():
        assert bound.precision == name
        assert len(bound.reason) > 40
        assert bound.most_rel is not None or bound.least_cosine is not None
    assert FP32.least_overlap == 1


@pytest.mark.parametrize(
    ("arithmetic", "bits", "expected"),
    [
        (("fp32",), 32, "fp32"),
        (("fp16",), 32, "fp16"),
        (("8da4w-g32",), 32, "8da4w"),
        (("int4-g128",), 32, "int4"),
        (("fp16", "8da4w"), 32, "8da4w"),
        (("8da4w", "8da8w"), 32, "8da4w"),
        (("fp16",), 16, "fp16-sums16"),
        # Nothing is computed in float16 there, whatever the processor could.
        (("fp32",), 16, "fp32"),
        (("8da8w",), 16, "8da8w"),
    ],
)
def test_the_coarsest_arithmetic_decides(
    manifest: Manifest, arithmetic: tuple[str, ...], bits: int, expected: str
) -> None:
    graph = msgspec.structs.replace(manifest.graphs[0], arithmetic=arithmetic)
    found = bound_for(graph, accumulator_bits=bits)
    assert found.precision == expected
    assert found.accumulator_bits == (bits if arithmetic == ("fp16",) else None)


def test_an_arithmetic_without_a_bound_is_refused(manifest: Manifest) -> None:
    with pytest.raises(BundleError, match="no parity bound is stated for '2da2w'"):
        bound_for(msgspec.structs.replace(manifest.graphs[0], arithmetic=("fp32", "2da2w")))


# Kept tokens

ORDER = np.array([9, 2, 30, 17, 5])
MARGIN = np.array([0.5, 0.4, 0.25, 1e-6, 0.1], np.float32)
KEPT = np.sort(ORDER)


def test_same_tokens() -> None:
    result = compare_kept(KEPT, KEPT, least_overlap=1, order=ORDER, margin=MARGIN)
    assert result.exact
    assert result.passed
    assert (result.overlap, result.same_slots, result.first_divergence) == (1, 1, None)


def test_first_divergence_is_the_first_in_the_order_of_selection() -> None:
    got = np.array([2, 5, 9, 18, 31])  # without 30, the third choice, and 17, the fourth
    result = compare_kept(KEPT, got, least_overlap=0.5, order=ORDER, margin=MARGIN)
    assert result.first_divergence is not None
    assert (result.first_divergence.step, result.first_divergence.index) == (2, 30)
    assert result.first_divergence.margin == pytest.approx(0.25)
    assert (result.missing, result.extra) == ((17, 30), (18, 31))
    assert result.overlap == pytest.approx(3 / 5)
    assert result.same_slots == pytest.approx(3 / 5)
    assert result.passed
    assert not compare_kept(KEPT, got, least_overlap=1).passed, "fp32 has no excuse"
    assert not compare_kept(KEPT, got, least_overlap=0.7).passed


def test_overlap_does_not_hide_disorder_or_repeats() -> None:
    swapped = KEPT[[1, 0, 2, 3, 4]]
    assert compare_kept(KEPT, swapped, least_overlap=0.5).overlap == 1
    assert not compare_kept(KEPT, swapped, least_overlap=0.5).passed
    repeated = np.array([2, 5, 9, 17, 17])
    assert not compare_kept(KEPT, repeated, least_overlap=0.5).passed
    assert not compare_kept(KEPT, repeated, least_overlap=0.5).ascending


def test_wrong_count_never_passes() -> None:
    assert not compare_kept(KEPT, KEPT[:-1], least_overlap=0.5).passed
    assert not compare_kept(KEPT, np.append(KEPT, 99), least_overlap=0.5).passed


def test_margin_that_is_no_number_is_left_out() -> None:
    margin = np.array([np.nan, np.inf, 0, 0, 0])
    result = compare_kept(KEPT, KEPT + 100, least_overlap=0, order=ORDER, margin=margin)
    assert result.first_divergence is not None
    assert result.first_divergence.margin is None
    msgspec.json.encode(result)


@given(st.sets(st.integers(0, 40), min_size=5, max_size=5), st.permutations(ORDER.tolist()))
def test_overlap_equals_the_sets(got: set[int], order: list[int]) -> None:
    result = compare_kept(KEPT, np.array(sorted(got)), least_overlap=0.4, order=np.array(order))
    assert result.overlap == len(got & set(KEPT.tolist())) / 5
    assert (result.first_divergence is None) == (got == set(KEPT.tolist()))
    assert set(result.missing) == set(KEPT.tolist()) - got


# Whole graphs


@pytest.fixture
def golden() -> Arrays:
    return make_golden(Sample(), noise_photo())


def _outputs(golden: Arrays) -> Arrays:
    return {key.removeprefix(f"{VISION}.out."): array.copy() for key, array in golden.items() if ".out." in key}


def _with(manifest: Manifest, *, precision: Literal["fp32", "fp16"]) -> Manifest:
    # 16 tokens of which 4 are kept: one changed choice would break any bound on the overlap.
    graphs = tuple(msgspec.structs.replace(graph, arithmetic=(precision,)) for graph in manifest.graphs)
    return msgspec.structs.replace(manifest, graphs=graphs)


def _judge(manifest: Manifest, golden: Arrays, got: Arrays) -> GraphParity:
    return graph_parity(manifest, manifest.graphs[0], golden, got, engine="x")


def test_equal_graph(manifest: Manifest, golden: Arrays) -> None:
    result = _judge(manifest, golden, _outputs(golden))
    assert result.passed
    assert result.kept is not None
    assert result.kept.exact
    assert result.kept_indices == tuple(golden["kept_indices"].tolist())
    assert [tensor.compared for tensor in result.tensors] == ["all"] * 3


def test_token_ids_as_whole_float32_numbers(manifest: Manifest, golden: Arrays) -> None:
    """Delegates have no int64: a program may give its positions in float32, and they must still be equal."""
    got = _outputs(golden)
    got["positions"] = got["positions"].astype(np.float32)
    result = _judge(manifest, golden, got)
    assert result.passed
    assert result.kept_indices == tuple(golden["kept_indices"].tolist())
    for bad in (0.25, np.nan):
        got["positions"][0, 1] = bad
        assert not _judge(manifest, golden, got).passed
    got["positions"][0, -1] = np.nan
    assert not _judge(manifest, golden, got).passed


def _swap_one(golden: Arrays) -> tuple[Arrays, int]:
    """Outputs in which the third choice was replaced by its neighbour, and the token that is missing."""
    got = _outputs(golden)
    kept = golden["kept_indices"]
    lost = int(golden["kept_order"][2])
    slot = int(np.flatnonzero(kept == lost)[0])
    free = next(token for token in range(kept[slot] + 1, 16) if token not in kept)
    changed = np.sort(np.where(kept == lost, free, kept))
    tokens = got["key_0"].transpose(0, 2, 1, 3).reshape(1, -1, 8)
    got["hidden"] = np.concatenate((tokens[:, :PREFIX], tokens[:, PREFIX + changed]), axis=1)
    got["positions"] = np.concatenate((np.arange(PREFIX), PREFIX + changed))[None]
    return got, lost


def test_other_tokens_in_fp32_fail(manifest: Manifest, golden: Arrays) -> None:
    got, lost = _swap_one(golden)
    result = _judge(manifest, golden, got)
    assert not result.passed
    assert result.kept is not None
    assert result.kept.missing == (lost,)
    assert result.kept.first_divergence is not None
    assert result.kept.first_divergence.step == 2
    hidden, positions, key = result.tensors
    assert hidden.compared == "all, 1 of 4 tokens chosen otherwise"
    assert hidden.passed, "each holds what it must for that choice: the fault is in the choice"
    assert not positions.passed
    assert positions.compared == "as kept tokens"
    assert key.compared == "all"


def test_other_tokens_in_fp16_hold_what_they_must(
    manifest: Manifest, golden: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    loose = msgspec.structs.replace(FP16, least_overlap=0.7)
    monkeypatch.setitem(BOUNDS, "fp16", loose)
    got, _ = _swap_one(golden)
    result = _judge(_with(manifest, precision="fp16"), golden, got)
    assert result.passed
    for slot in range(4):
        wrong = {name: array.copy() for name, array in got.items()}
        wrong["hidden"][0, PREFIX + slot] *= 1.01
        result = _judge(_with(manifest, precision="fp16"), golden, wrong)
        assert not result.passed
        token = got["positions"][0, PREFIX + slot] - PREFIX
        assert result.tensors[0].note == f"1 of 4 kept tokens outside the bound, image token {token} first"


def test_no_token_in_common(manifest: Manifest, golden: Arrays) -> None:
    got = _outputs(golden)
    others = [token for token in range(16) if token not in golden["kept_indices"]][:4]
    got["positions"][0, PREFIX:] = np.array(others) + PREFIX
    result = _judge(_with(manifest, precision="fp16"), golden, got)
    assert not result.passed
    assert result.tensors[0].compared == "all, 4 of 4 tokens chosen otherwise"
    msgspec.json.encode(result)


@pytest.mark.parametrize("positions", [[0, 0, 1, 2], [2, 1, 3, 4], [-1, 1, 2, 3], [12, 13, 14, 16]])
def test_kept_tokens_that_are_none(manifest: Manifest, golden: Arrays, positions: list[int]) -> None:
    got = _outputs(golden)
    got["positions"][0, PREFIX:] = np.array(positions) + PREFIX
    result = _judge(manifest, golden, got)
    assert not result.passed
    assert result.tensors[0].note == "the kept tokens are not ascending tokens of the image"


@pytest.mark.parametrize("name", ["hidden", "similarity", "share", "least_share"])
def test_golden_without_what_recovery_is_made_of(manifest: Manifest, golden: Arrays, name: str) -> None:
    whole = golden[f"recovery.{name}"]
    for broken in (None, whole[:0], np.full_like(whole, np.nan)):
        golden.pop(f"recovery.{name}", None)
        if broken is not None:
            golden[f"recovery.{name}"] = broken
        with pytest.raises(BundleError, match=rf"the golden('s| lacks) recovery\.{name}.*export again"):
            _judge(manifest, golden, _outputs(golden))


def _without_recovery(golden: Arrays) -> None:
    for name in [name for name in golden if name.startswith("recovery.")]:
        del golden[name]


def test_golden_without_recovery_holds_rows_as_they_are(manifest: Manifest, golden: Arrays) -> None:
    _without_recovery(golden)
    result = _judge(manifest, golden, _outputs(golden))
    assert result.passed
    assert {tensor.compared for tensor in result.tensors} == {"all"}
    got = _outputs(golden)
    got["hidden"][0, PREFIX + 3] *= 1.01
    result = _judge(manifest, golden, got)
    assert not result.passed
    assert result.tensors[0].note.startswith("1 of ")
    assert "kept tokens outside the bound" in result.tensors[0].note


def test_golden_without_recovery_knows_no_other_choice(
    manifest: Manifest, golden: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BOUNDS, "fp16", msgspec.structs.replace(FP16, least_overlap=0.7))
    got, _ = _swap_one(golden)
    assert _judge(_with(manifest, precision="fp16"), golden, got).passed
    _without_recovery(golden)
    result = _judge(_with(manifest, precision="fp16"), golden, got)
    assert not result.passed
    assert "tokens chosen otherwise, and the golden holds no rows of them" in result.tensors[0].note


def test_golden_whose_recovery_is_of_something_else(manifest: Manifest, golden: Arrays) -> None:
    golden["recovery.hidden"] = golden["recovery.hidden"] * 1.01
    with pytest.raises(BundleError, match=r"hidden is not what recovery\.hidden gives"):
        _judge(manifest, golden, _outputs(golden))


def test_wrong_prefix_positions_fail_even_where_tokens_may_differ(
    manifest: Manifest, golden: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BOUNDS, "fp16", msgspec.structs.replace(FP16, least_overlap=0.7))
    got, _ = _swap_one(golden)
    got["positions"][0, 0] = 7
    result = _judge(_with(manifest, precision="fp16"), golden, got)
    assert not result.passed
    assert result.tensors[1].note == f"the {PREFIX} positions of the prompt differ"


def test_golden_without_an_output(manifest: Manifest, golden: Arrays) -> None:
    got = _outputs(golden)
    del golden[f"{VISION}.out.hidden"]
    with pytest.raises(BundleError, match=f"lacks {VISION}.out.hidden"):
        _judge(manifest, golden, got)


def test_golden_of_another_shape(manifest: Manifest, golden: Arrays) -> None:
    got = _outputs(golden)
    golden[f"{VISION}.out.hidden"] = golden[f"{VISION}.out.hidden"][:, :-1]
    with pytest.raises(BundleError, match="the manifest says"):
        _judge(manifest, golden, got)


def test_golden_that_contradicts_itself(manifest: Manifest, golden: Arrays) -> None:
    golden["kept_indices"] = golden["kept_indices"] + 1
    with pytest.raises(BundleError, match="contradicts itself"):
        _judge(manifest, golden, _outputs(golden))


def test_cut_0(tmp_path_factory: pytest.TempPathFactory) -> None:
    sample = Sample(cut=0)
    manifest = fill(tmp_path_factory.mktemp("b"), "b", sample, noise_photo())
    golden = make_golden(sample, noise_photo())
    got = _outputs(golden)
    assert _judge(manifest, golden, got).passed
    got["kept_indices"][0, -1] += 1 if got["kept_indices"][0, -1] < 15 else -1
    result = _judge(manifest, golden, got)
    assert not result.passed
    assert result.tensors[0].compared == "all, 1 of 4 tokens chosen otherwise"


def test_graph_without_token_ids(manifest: Manifest, golden: Arrays) -> None:
    graph = manifest.graphs[0]
    bare: GraphInfo = msgspec.structs.replace(
        graph, outputs=tuple(info for info in graph.outputs if info.name == "key_0")
    )
    result = graph_parity(manifest, bare, golden, {"key_0": _outputs(golden)["key_0"]}, engine="x")
    assert result.passed
    assert result.kept is None


def test_twin_is_compared_like_any_other(tmp_path_factory: pytest.TempPathFactory) -> None:
    sample = Sample(keep=16)
    manifest = fill(tmp_path_factory.mktemp("b"), "b", sample, noise_photo())
    prune: PruneInfo = manifest.prune
    assert not prune.pruned
    golden = make_golden(sample, noise_photo())
    result = _judge(manifest, golden, _outputs(golden))
    assert result.passed
    assert result.kept_indices == tuple(range(16))


# Text: perplexity, equal next tokens, and the greedy answer


def _logits(*shares: tuple[float, ...]) -> np.ndarray:
    """(1, T, V) logits of the given shares, each row moved by another constant: only differences count."""
    rows = np.log(np.asarray(shares, np.float64))
    return np.asarray(rows + np.arange(len(rows))[:, None] * 300.0 - 300.0)[None]


def test_perplexity_by_hand() -> None:
    """Behind ids 0, 2, 1, 0 come 2, 1, 0 and an end that nothing is known of."""
    ids = np.array([0, 2, 1, 0])
    expected = _logits((0.25, 0.25, 0.5), (0.25, 0.5, 0.25), (0.5, 0.25, 0.25), (0.1, 0.1, 0.8))
    got = _logits((0.25, 0.5, 0.25), (0.25, 0.5, 0.25), (0.125, 0.75, 0.125), (0.8, 0.1, 0.1))
    result = text_parity(ids, expected, got)
    assert result.tokens == 3
    assert result.expected_perplexity == pytest.approx(2.0)
    assert result.got_perplexity == pytest.approx((4 * 2 * 8) ** (1 / 3))
    assert result.same_top1 == pytest.approx(1 / 3)


def test_perplexity_of_a_guess_is_the_size_of_the_vocabulary() -> None:
    result = text_parity(np.arange(9), np.zeros((1, 9, 50), np.float32), np.full((1, 9, 50), -7e4, np.float32))
    assert result.expected_perplexity == pytest.approx(50)
    assert result.got_perplexity == pytest.approx(50)
    assert (result.tokens, result.same_top1) == (8, 1.0)


@pytest.mark.parametrize("bad", [np.nan, -np.inf, -1e30])
def test_perplexity_beyond_all_numbers_is_none(bad: float) -> None:
    got = np.zeros((1, 3, 4))
    got[0, 1, 2] = bad
    result = text_parity(np.array([0, 1, 2]), np.zeros((1, 3, 4)), got)
    assert result.expected_perplexity == pytest.approx(4)
    assert result.got_perplexity is None
    msgspec.json.encode(result)


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 4], [0, -1, 2], [0, 1, 2, 3]])
def test_text_that_is_not_that_of_the_logits(ids: list[int]) -> None:
    with pytest.raises(BundleError, match="its text is not 3 ids below 4"):
        text_parity(np.array(ids), np.zeros((1, 3, 4)), np.zeros((1, 3, 4)))


def test_answer_by_hand() -> None:
    margin = np.array([0.5, 0.25, 0.125, 1.0], np.float32)
    ids = np.array([7, 8, 9, 7])
    same = compare_answer(ids, ids.copy(), margin=margin, exact=True)
    assert (same.expected_count, same.same, same.first_divergence, same.passed) == (4, 4, None, True)
    # One token differs and the next ones happen to be equal again.
    other = np.array([7, 8, 1, 7])
    judged = compare_answer(ids, other, margin=margin, exact=True)
    assert (judged.same, judged.passed, judged.bound) == (3, False, "every token equal")
    assert judged.first_divergence == Divergence(step=2, index=9, margin=0.125)
    reported = compare_answer(ids, other, margin=margin, exact=False)
    assert (reported.same, reported.passed, reported.bound) == (3, True, "reported only")
    assert reported.first_divergence == judged.first_divergence


def test_answers_of_different_lengths() -> None:
    with pytest.raises(BundleError, match="the golden contradicts itself"):
        compare_answer(np.arange(4), np.arange(3), margin=np.ones(4), exact=True)
    with pytest.raises(BundleError, match="the golden contradicts itself"):
        compare_answer(np.arange(4), np.arange(4), margin=np.ones(3), exact=False)
