"""The pruner gives the authors' answers: eager, exported, in fp16, and in every engine that runs here."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.golden_cases import FOLDER, Case, Program, cases, features_of, program_of, tensor_of
from benchmarks.pruner_alone import Engine, PrunerGraph, lowered
from pruning import PruneSpec, TokenPruner, reference
from runtime.check.recovery import Recovery

pytestmark = [pytest.mark.golden, pytest.mark.usefixtures("one_thread")]

TOKENS_ATOL = 1e-4  # promised by the vectors
MOVED_BY = 1e-7
HALF_OVERLAP = 0.98
HALF_SCALE = 1.37  # the features are stored in fp16: a cast rounds only what was moved off that lattice


CASES = cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


PROGRAMS = tuple(dict.fromkeys(map(program_of, CASES)))
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=str)


@functools.cache
def _right_tokens(case: Case) -> tuple[np.ndarray, ...]:
    """Every right answer (keep, D): the vectors', and those of the near ties that they name, decided otherwise."""
    stored = tensor_of(f"{case.name}.tokens").numpy()
    if not case.near_ties:
        return (stored,)
    keys, hidden = (x.double() for x in features_of(case.features))
    parts = reference.trace(keys, hidden, case.spec).recovery
    assert parts is not None
    recovery = Recovery(
        hidden=hidden[0].numpy(),
        similarity=parts.similarity[0].numpy(),
        share=parts.share,
        least_share=parts.least_share,
    )
    kept = tensor_of(f"{case.name}.indices").numpy()
    decided = recovery.standing(kept).slot
    answers = []
    for otherwise in product((False, True), repeat=len(case.near_ties)):
        slot, concerned = decided.copy(), []
        for tie, other in zip(case.near_ties, otherwise, strict=True):
            slots = np.searchsorted(kept, tie.kept)
            assert decided[tie.dropped] == slots[0], "the vectors name the more similar one first"
            if other:
                slot[tie.dropped] = slots[1]
                concerned += slots.tolist()
        answer = stored.copy()  # all other rows hold as stored
        answer[concerned] = recovery.rows(kept, slot)[concerned]
        answers.append(answer)
    return tuple(answers)


def _assert_golden(case: Case, tokens: np.ndarray | torch.Tensor, indices: np.ndarray | torch.Tensor) -> None:
    expected = tensor_of(f"{case.name}.indices").numpy()[None]
    assert expected.shape == (1, case.spec.keep)
    np.testing.assert_array_equal(np.asarray(indices), expected)
    if not case.has_tokens:
        return
    got = np.asarray(tokens)[0]
    nearest = min(_right_tokens(case), key=lambda right: np.abs(right - got).max())
    np.testing.assert_allclose(got, nearest, rtol=0.0, atol=TOKENS_ATOL)


@functools.cache
def _eager(spec: PruneSpec) -> TokenPruner:
    return TokenPruner(spec).eval()


@functools.cache
def _exported(program: Program) -> torch.nn.Module:
    count = program.spec.tokens
    inputs = torch.zeros(1, count, program.key_width), torch.zeros(1, count, program.hidden_width)
    with torch.no_grad():
        return torch.export.export(_eager(program.spec), inputs, strict=False).module()


def test_every_case_is_complete() -> None:
    assert CASES, f"{FOLDER}/selection.json lists no cases"
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert 1 <= case.official_count <= case.spec.keep
        count = case.spec.tokens
        assert len(tensor_of(f"{case.features}.keys")) == len(tensor_of(f"{case.features}.hidden")) == count
        assert len(tensor_of(f"{case.name}.indices")) == case.spec.keep
        assert not case.has_tokens or len(tensor_of(f"{case.name}.tokens")) == case.spec.keep


def test_either_decision_of_a_named_near_tie_is_right_and_no_other() -> None:
    case = next(case for case in CASES if case.near_ties and case.has_tokens)
    (indices,) = tensor_of(f"{case.name}.indices")[None].numpy()
    stored, *others = _right_tokens(case)
    assert others
    for answer in (stored, *others):
        _assert_golden(case, answer[None], indices[None])
    assert min(np.abs(stored - other).max() for other in others) > 10 * TOKENS_ATOL, "the decisions must differ"
    unnamed = replace(case, near_ties=())
    for other in others:
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            _assert_golden(unnamed, other[None], indices[None])
    wrong = others[-1].copy()
    wrong[(np.searchsorted(indices, case.near_ties[0].kept[0]) + 1) % len(wrong)] += 2 * TOKENS_ATOL
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        _assert_golden(case, wrong[None], indices[None])


@every_case
def test_reference(case: Case) -> None:
    _assert_golden(case, *reference.prune(*features_of(case.features), case.spec))


@every_case
def test_decisions_hold_in_float64_and_for_features_moved_in_their_last_bits(case: Case) -> None:
    """What float32's own rounding can move is a near tie, and the vectors name all of them."""
    keys, hidden = features_of(case.features)
    _assert_golden(case, *reference.prune(keys.double(), hidden.double(), case.spec))
    draw = torch.Generator().manual_seed(0)
    keys, hidden = (x * (1.0 + MOVED_BY * torch.randn(x.shape, generator=draw)) for x in (keys, hidden))
    _assert_golden(case, *reference.prune(keys, hidden, case.spec))
    _assert_golden(case, *_eager(case.spec)(keys, hidden))


@every_case
@torch.no_grad()
def test_eager(case: Case) -> None:
    tokens, indices, filled = _eager(case.spec).select(*features_of(case.features))
    assert indices.dtype == torch.int64
    assert filled.item() == 0.0, "the steps ran out"
    _assert_golden(case, tokens, indices)


@every_case
@torch.no_grad()
def test_exported(case: Case) -> None:
    _assert_golden(case, *_exported(program_of(case))(*features_of(case.features)))


@every_case
@torch.no_grad()
def test_half_precision_features(case: Case) -> None:
    keys, hidden = (x * HALF_SCALE for x in features_of(case.features))
    assert not torch.equal(hidden.half().float(), hidden), "the cast must round something"
    single = reference.prune(keys, hidden, case.spec)[1]
    tokens, indices = _eager(case.spec)(keys.half(), hidden.half())
    assert tokens.dtype == torch.float16
    overlap = float(torch.isin(indices, single).float().mean())
    assert overlap >= HALF_OVERLAP
    # What rounding moved is the features, not the arithmetic: the same fp16 features have the same answer.
    expected_tokens, expected_indices = reference.prune(keys.half(), hidden.half(), case.spec)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(tokens, expected_tokens, rtol=2.0**-9, atol=1e-3)


def _engine_run(program: Program, engine: Engine) -> object:
    """Lowering takes time in proportion to the steps; many small batches need hundreds, and those are run by hand."""
    long = engine != "onnxruntime" and TokenPruner(program.spec).steps > 100
    return pytest.param(program, engine, id=f"{engine}-{program}", marks=[pytest.mark.full] if long else [])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("program", "engine"),
    [_engine_run(program, engine) for program in PROGRAMS for engine in ("executorch", "onnxruntime", "coreml")],
)
def test_engine(program: Program, engine: Engine, tmp_path: Path) -> None:
    """Lowered once, then every case that fits the graph; one partition with nothing outside. Core ML is evaluated."""
    graph = PrunerGraph(_eager(program.spec), key_width=program.key_width, hidden_width=program.hidden_width)
    coverage, loaded = lowered(graph, engine, tmp_path)
    assert coverage.partitions == 1
    assert coverage.outside == ()
    for case in CASES:
        if program_of(case) == program:
            _assert_golden(case, *loaded.run([x.numpy() for x in features_of(case.features)]))
