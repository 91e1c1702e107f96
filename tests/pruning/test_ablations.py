"""VLM-Pruner without one of its parts: each differs from the whole where that part decides, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from pruning import METHODS, Features, PruneSpec, Trace, settings_numbers

pytestmark = pytest.mark.usefixtures("one_thread")

GRID = (12, 12)
KEEP = 48


def _features() -> Features:
    chance = torch.Generator().manual_seed(4)
    centres = torch.randn(6, 32, generator=chance)[torch.randint(0, 6, (144,), generator=chance)]
    return Features(
        hidden=(centres + 0.5 * torch.randn(144, 32, generator=chance))[None],
        keys=torch.randn(1, 144, 12, generator=chance),
    )


def _trace(method: str) -> Trace:
    return METHODS[method].choose(_features(), PruneSpec(grid=GRID, keep=KEEP, method=method))


def test_constants_differ_in_one() -> None:
    whole = settings_numbers(PruneSpec(method="vlm-pruner"))
    for method, name, value in (
        ("vlm-pruner-no-bss", "distance_weight", 0.0),
        ("vlm-pruner-no-recovery", "recovery", 0.0),
        ("vlm-pruner-norm-pivots", "norm_pivots", 4),
    ):
        assert settings_numbers(PruneSpec(method=method)) == {**whole, name: value}


def test_without_recovery_the_same_tokens_stay_as_they_are() -> None:
    whole, without = _trace("vlm-pruner"), _trace("vlm-pruner-no-recovery")
    assert torch.equal(without.order, whole.order)
    assert torch.equal(without.tokens, _features().hidden[:, without.indices[0]])
    assert not torch.equal(without.tokens, whole.tokens)


def test_pivots_by_norm_are_the_largest_keys() -> None:
    keys = _features().keys
    assert keys is not None
    norms = keys[0].abs().sum(-1)
    by_norm, whole = _trace("vlm-pruner-norm-pivots").marks[0], _trace("vlm-pruner").marks[0]
    assert by_norm.tolist() == norms.topk(4).indices.tolist()
    assert whole[0] == by_norm[0]
    assert whole.tolist() != by_norm.tolist()


def test_without_bss_places_on_the_grid_count_nothing() -> None:
    """Tokens that change places keep their fate, which with the buffer they do not."""
    features, moved = _features(), torch.randperm(144, generator=torch.Generator().manual_seed(1))
    shuffled = Features(*(None if x is None else x[:, moved] for x in features))  # type: ignore[arg-type]

    def fates(method: str, given: Features) -> set[int]:
        spec = PruneSpec(grid=GRID, keep=KEEP, method=method)
        return set(METHODS[method].choose(given, spec).order[0].tolist())

    back = {int(moved[token]) for token in fates("vlm-pruner-no-bss", shuffled)}
    # Batches of candidates are walked by score, so that the order of positions decides ties alone.
    assert back == fates("vlm-pruner-no-bss", features)
    assert {int(moved[token]) for token in fates("vlm-pruner", shuffled)} != fates("vlm-pruner", features)


@pytest.mark.parametrize("method", ["vlm-pruner-no-bss", "vlm-pruner-no-recovery", "vlm-pruner-norm-pivots"])
def test_static_forms_agree_on_a_larger_grid(method: str) -> None:
    spec, features = PruneSpec(grid=GRID, keep=KEEP, method=method), _features()
    trace = METHODS[method].choose(features, spec)
    with torch.no_grad():
        for arithmetic in METHODS[method].arithmetics:
            kept = METHODS[method].module(spec, arithmetic)(features)
            assert torch.equal(kept.indices, trace.indices)
            torch.testing.assert_close(kept.tokens, trace.tokens, rtol=0.0, atol=1e-4)
            assert not kept.filled.any()
