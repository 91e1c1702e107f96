"""The pruner gives the authors' answers: eager, exported, in fp16, and in every engine that runs here."""

from __future__ import annotations

import functools
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from pruning import PruneSpec, TokenPruner, reference
from tests.pruner_graph import Engine, PrunerGraph, lowered

pytestmark = [pytest.mark.golden, pytest.mark.usefixtures("one_thread")]

FOLDER = Path(os.environ.get("PRUNEPORT_GOLDEN") or Path(__file__).parent / "golden")
TOKENS_ATOL = 1e-4  # promised by the vectors
HALF_OVERLAP = 0.98
HALF_SCALE = 1.37  # the features are stored in fp16: a cast rounds only what was moved off that lattice


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of selection.json."""

    name: str
    features: str
    spec: PruneSpec
    official_count: int
    near_ties: tuple[tuple[int, int, int], ...]  # a dropped token and two kept ones, of which either may stand for it


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one lowered graph is made for; it serves all features of these widths."""

    spec: PruneSpec
    key_width: int
    hidden_width: int

    def __str__(self) -> str:
        spec = self.spec
        return (
            f"{spec.grid[0]}x{spec.grid[1]}-keep{spec.keep}-p{spec.pivots}-t{spec.threshold:g}-b{spec.token_batch}"
            f"-{self.key_width}-{self.hidden_width}"
        )


def _tensor(name: str) -> torch.Tensor:
    with safe_open(FOLDER / "selection.safetensors", framework="pt") as file:
        return torch.as_tensor(file.get_tensor(name))


def _width(name: str) -> int:
    with safe_open(FOLDER / "selection.safetensors", framework="pt") as file:
        return int(file.get_slice(name).get_shape()[1])


def _cases() -> tuple[Case, ...]:
    return tuple(
        Case(
            name=row["name"],
            features=row["features"],
            official_count=row["official_count"],
            near_ties=tuple((tie["dropped"], *tie["kept"]) for tie in row.get("near_ties", ())),
            spec=PruneSpec(
                grid=tuple(row["grid"]),
                keep=row["keep"],
                pivots=row["pivots"],
                threshold=row["threshold"],
                token_batch=row["token_batch"],
            ),
        )
        for row in json.loads((FOLDER / "selection.json").read_text())
    )


CASES = _cases()
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _program(case: Case) -> Program:
    return Program(
        spec=case.spec, key_width=_width(f"{case.features}.keys"), hidden_width=_width(f"{case.features}.hidden")
    )


PROGRAMS = tuple(dict.fromkeys(map(_program, CASES)))
every_program = pytest.mark.parametrize("program", PROGRAMS, ids=str)


def _features(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _tensor(f"{name}.keys").float()[None], _tensor(f"{name}.hidden").float()[None]


def right_tokens(case: Case) -> list[torch.Tensor]:
    """The answer, and those in which dropped tokens between two kept ones went to the other: (keep, D) each."""
    hidden = _features(case.features)[1][0].double()
    similarity = reference._similarity(hidden, case.spec)
    answers = [_tensor(f"{case.name}.tokens")]
    for others in itertools.product([False, True], repeat=len(case.near_ties)):
        other = similarity.clone()
        for dropped, *kept in itertools.compress(case.near_ties, others):
            other[dropped, kept] = similarity[dropped, kept[::-1]]
        if any(others):
            indices = _tensor(f"{case.name}.indices").long()
            answers.append(reference._recover(other, hidden, indices, case.spec).float())
    return answers


def _assert_golden(case: Case, tokens: np.ndarray | torch.Tensor, indices: np.ndarray | torch.Tensor) -> None:
    expected = _tensor(f"{case.name}.indices").numpy()[None]
    assert expected.shape == (1, case.spec.keep)
    np.testing.assert_array_equal(np.asarray(indices), expected)
    np.testing.assert_allclose(
        np.asarray(tokens), _tensor(f"{case.name}.tokens").numpy()[None], rtol=0.0, atol=TOKENS_ATOL
    )


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
        assert len(_tensor(f"{case.features}.keys")) == len(_tensor(f"{case.features}.hidden")) == count
        assert len(_tensor(f"{case.name}.tokens")) == len(_tensor(f"{case.name}.indices")) == case.spec.keep


@every_case
def test_reference(case: Case) -> None:
    _assert_golden(case, *reference.prune(*_features(case.features), case.spec))


@every_case
@torch.no_grad()
def test_eager(case: Case) -> None:
    tokens, indices, filled = _eager(case.spec).select(*_features(case.features))
    assert indices.dtype == torch.int64
    assert filled.item() == 0.0, "the steps ran out"
    _assert_golden(case, tokens, indices)


@every_case
@torch.no_grad()
def test_exported(case: Case) -> None:
    _assert_golden(case, *_exported(_program(case))(*_features(case.features)))


@every_case
@torch.no_grad()
def test_half_precision_features(case: Case) -> None:
    keys, hidden = (x * HALF_SCALE for x in _features(case.features))
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
        if _program(case) == program:
            _assert_golden(case, *loaded.run([x.numpy() for x in _features(case.features)]))
