"""What kept tokens hold after recovery: the paper's rows, and those of near ties decided the other way."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import PruneSpec, Trace, reference
from pruning.recovery import CANCELLATION
from pruning.vlm_pruner.settings import Settings
from runtime.bundle import GraphInfo, Manifest, TensorInfo
from runtime.check.parity import BOUNDS, GraphParity, NearTie, graph_parity
from runtime.check.recovery import Moved, Recovery
from tests.sample_bundle import PREFIX, VISION, Arrays, Sample, fill, noise_photo

SPEC = PruneSpec(grid=(6, 6), keep=8, settings=Settings(token_batch=4))
WIDTH = 24


def _features(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens with much in common, so that weights are far from cancelling."""
    chance = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, SPEC.tokens, WIDTH, generator=chance)
    return keys, torch.randn(1, SPEC.tokens, WIDTH, generator=chance) + torch.randn(1, 1, WIDTH, generator=chance)


def _similarity(trace: Trace) -> torch.Tensor:
    assert trace.recovery is not None
    return trace.recovery.similarity


def _recovery(trace: Trace, hidden: torch.Tensor, spec: PruneSpec = SPEC) -> Recovery:
    return Recovery(
        hidden=hidden[0].double().numpy(),
        similarity=_similarity(trace)[0].double().numpy(),
        share=Settings.of(spec).recovery,
        least_share=CANCELLATION,
    )


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), keep=st.integers(1, 36), share=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_rows_are_the_papers(seed: int, keep: int, share: float) -> None:
    spec = replace(SPEC, keep=keep, settings=Settings(token_batch=4, recovery=share))
    keys, hidden = (x.double() for x in _features(seed))
    trace = reference.trace(keys, hidden, spec)
    recovery, kept = _recovery(trace, hidden, spec), trace.indices[0].numpy()
    standing = recovery.standing(kept)
    np.testing.assert_allclose(recovery.rows(kept, standing.slot), trace.tokens[0].numpy(), rtol=1e-9, atol=1e-9)
    assert (standing.slot[kept] == -1).all()
    assert (standing.margin >= 0).all()
    assert np.isinf(standing.margin).sum() == (len(standing.margin) if keep == 1 else keep)


def test_margin_and_runner_up_by_hand() -> None:
    similarity = np.eye(4)
    similarity[1] = [0.5, 1.0, 0.1, 0.375]
    recovery = Recovery(hidden=np.arange(8.0).reshape(4, 2), similarity=similarity, share=0.5, least_share=0.001)
    kept = np.array([0, 3])
    standing = recovery.standing(kept)
    assert standing.slot.tolist() == [-1, 0, 0, -1]
    assert standing.margin[1] == 0.125
    moved = recovery.rows(kept, np.array([-1, 1, 0, -1]))
    # Token 2 is like neither, so that it weighs nothing; token 1 is half of what token 3 holds.
    np.testing.assert_allclose(moved, [[0.0, 1.0], [(6 + 2) / 2, (7 + 3) / 2]])
    rows, found = recovery.decided_as(kept, moved, np.array([True, True]), resolution=0.2)
    np.testing.assert_allclose(rows, moved)
    assert found == (Moved(token=1, desktop=0, engine=3, margin=0.125),)
    rows, found = recovery.decided_as(kept, moved, np.array([True, True]), resolution=0.1)
    assert found == ()
    np.testing.assert_allclose(rows, recovery.rows(kept, standing.slot))


# What the judge makes of it


class Judged:
    """A golden with near ties, and the judge in fp16's arithmetic."""

    def __init__(self, manifest: Manifest, *, seed: int = 3) -> None:
        keys, hidden = _features(seed)
        trace = reference.trace(keys, hidden, SPEC)
        self.recovery = _recovery(trace, hidden)
        self.kept = trace.indices[0].numpy()
        self.standing = self.recovery.standing(self.kept)
        self.bound = BOUNDS["fp16"]
        prefix = np.random.default_rng(0).standard_normal((1, PREFIX, WIDTH)).astype(np.float32)
        self.expected = {
            "hidden": np.concatenate([prefix, trace.tokens.numpy()], axis=1),
            "positions": np.concatenate([np.arange(PREFIX), self.kept + PREFIX])[None],
        }
        self.golden: Arrays = {f"{VISION}.out.{name}": array for name, array in self.expected.items()} | {
            "kept_indices": self.kept,
            "recovery.hidden": hidden[0].numpy(),
            "recovery.similarity": _similarity(trace)[0].numpy(),
            "recovery.share": np.full(1, Settings.of(SPEC).recovery),
            "recovery.least_share": np.full(1, CANCELLATION),
        }
        infos = tuple(
            TensorInfo(name=name, shape=array.shape, dtype=str(array.dtype)) for name, array in self.expected.items()
        )
        self.graph: GraphInfo = msgspec.structs.replace(manifest.graphs[0], outputs=infos, arithmetic=("fp16",))
        self.manifest = msgspec.structs.replace(
            manifest,
            prune=msgspec.structs.replace(manifest.prune, image_tokens=SPEC.tokens, keep=SPEC.keep, grid=SPEC.grid),
            frame=msgspec.structs.replace(manifest.frame, image=SPEC.tokens),
        )

    def got(self, slot: np.ndarray, *, noise: float = 0.0) -> Arrays:
        """The engine's outputs where dropped token i went to the kept token of `slot[i]`, off by relative noise."""
        rows = self.recovery.rows(self.kept, slot)
        off = np.random.default_rng(1).standard_normal(rows.shape)
        rows = rows + off * (noise * np.linalg.norm(rows, axis=1) / np.linalg.norm(off, axis=1))[:, None]
        hidden = np.concatenate([self.expected["hidden"][:, :PREFIX], rows[None]], axis=1).astype(np.float32)
        return {**self.expected, "hidden": hidden}

    def otherwise(self, *tokens: int, rank: int = 1) -> np.ndarray:
        """Slots where these tokens went to their runner-up (or the next ones by `rank`)."""
        slot = self.standing.slot.copy()
        for token in tokens:
            slot[token] = np.argsort(-self.recovery.similarity[token, self.kept], kind="stable")[rank]
        return slot

    def judge(self, got: Arrays) -> GraphParity:
        return graph_parity(self.manifest, self.graph, self.golden, got, engine="x")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return fill(tmp_path_factory.mktemp("b"), "b", Sample(), noise_photo())


def _resolved_at(judged: Judged, monkeypatch: pytest.MonkeyPatch, *, near: int) -> list[int]:
    """Moves the resolution so that just `near` dropped tokens lie below it; all tokens, the nearest tie first."""
    order: list[int] = np.argsort(judged.standing.margin, kind="stable").tolist()
    between = float(judged.standing.margin[order[near - 1 : near + 1]].mean())
    judged.bound = msgspec.structs.replace(BOUNDS["fp16"], resolution=between)
    monkeypatch.setitem(BOUNDS, "fp16", judged.bound)
    return order


def test_a_near_tie_is_reported_and_passes(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged(manifest)
    order = _resolved_at(judged, monkeypatch, near=4)
    for tokens in (order[:1], order[1:2], order[:2], order[:4]):
        result = judged.judge(judged.got(judged.otherwise(*tokens), noise=1e-3))
        hidden = result.tensors[0]
        assert result.passed, hidden
        assert sorted(tie.token for tie in hidden.near_ties) == sorted(tokens)
        assert hidden.compared == f"all, {len(tokens)} near tie{'s' if len(tokens) > 1 else ''} decided otherwise"
        for tie in hidden.near_ties:
            slots = judged.standing.slot[tie.token], judged.otherwise(tie.token)[tie.token]
            margin = float(judged.standing.margin[tie.token])
            assert tie.margin == pytest.approx(margin)
            assert tie == NearTie(
                token=tie.token,
                desktop=int(judged.kept[slots[0]]),
                engine=int(judged.kept[slots[1]]),
                margin=tie.margin,
                resolution=judged.bound.resolution,
            )
        assert msgspec.json.decode(msgspec.json.encode(result), type=GraphParity) == result


def test_a_decision_beyond_the_resolution_fails(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged(manifest)
    order = _resolved_at(judged, monkeypatch, near=4)
    dropped = [token for token in order if np.isfinite(judged.standing.margin[token])]
    for token in dropped[4:]:
        result = judged.judge(judged.got(judged.otherwise(token), noise=1e-3))
        assert not result.passed, token
        assert "kept tokens outside the bound" in result.tensors[0].note


def test_a_third_candidate_fails(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged(manifest)
    order = _resolved_at(judged, monkeypatch, near=4)
    assert not judged.judge(judged.got(judged.otherwise(order[0], rank=5), noise=1e-3)).passed


def test_a_wrong_recovery_fails(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged(manifest)
    _resolved_at(judged, monkeypatch, near=4)
    right = judged.got(judged.standing.slot)
    assert judged.judge(right).passed
    own = judged.recovery.hidden[judged.kept]
    for slot in range(SPEC.keep):
        wrong = {name: array.copy() for name, array in right.items()}
        row = wrong["hidden"][0, PREFIX + slot]
        row += 0.05 * (own[slot] - row)  # recovery of 0.665 instead of 0.7
        if not np.array_equal(own[slot].astype(np.float32), right["hidden"][0, PREFIX + slot]):
            assert not judged.judge(wrong).passed, slot


def test_no_bound_moves_where_a_near_tie_fell_otherwise(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = Judged(manifest)
    order = _resolved_at(judged, monkeypatch, near=4)
    most = judged.bound.most_rel
    assert most is not None
    assert judged.judge(judged.got(judged.otherwise(order[0]), noise=0.9 * most)).passed
    assert not judged.judge(judged.got(judged.otherwise(order[0]), noise=1.1 * most)).passed
    tie = judged.standing.slot[order[0]]
    worse = judged.got(judged.otherwise(order[0]))
    worse["hidden"][0, PREFIX + tie] *= 1 + 1.1 * most
    assert not judged.judge(worse).passed


def test_a_choice_that_float32_cannot_tell_passes_and_no_other(manifest: Manifest) -> None:
    judged = Judged(manifest)
    judged.graph = msgspec.structs.replace(judged.graph, arithmetic=("fp32",))
    free = np.setdiff1d(np.arange(SPEC.tokens), judged.kept)
    others = [np.sort(np.append(judged.kept[:-1], token)) for token in free[:2]]
    judged.golden["kept_alternatives"] = np.stack(others[:1])
    for kept, right in zip(others, (True, False), strict=True):
        rows = judged.recovery.rows(kept, judged.recovery.standing(kept).slot)
        hidden = np.concatenate([judged.expected["hidden"][:, :PREFIX], rows[None]], axis=1).astype(np.float32)
        result = judged.judge({"hidden": hidden, "positions": np.concatenate([np.arange(PREFIX), kept + PREFIX])[None]})
        assert result.passed is right
        assert result.kept is not None
        assert result.kept.near_tie is right
        assert result.tensors[0].passed, "the rows are right for either choice"
