"""What every pruning method promises, whichever it is: one contract, and the settings it may be asked for."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import ARITHMETICS, METHODS, Arithmetic, Features, Kept, Method, PruneSpec, SpecError, settings_numbers

pytestmark = pytest.mark.usefixtures("one_thread")

quick = settings(max_examples=30, deadline=None, derandomize=True)
KEY_WIDTH, WIDTH = 7, 12
# Square and not, one row, one column, one token.
GRIDS = [(4, 4), (3, 5), (1, 9), (7, 1), (1, 1)]
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@st.composite
def _shapes(draw: st.DrawFn) -> tuple[tuple[int, int], int]:
    """A grid and from 1 to all of its tokens."""
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    return grid, draw(st.integers(1, grid[0] * grid[1]))


def _features(spec: PruneSpec, *, seed: int, images: int = 1) -> Features:
    chance = torch.Generator().manual_seed(seed)
    return Features(
        hidden=torch.randn(images, spec.tokens, WIDTH, generator=chance),
        keys=torch.randn(images, spec.tokens, KEY_WIDTH, generator=chance),
    )


def _run(method: Method, spec: PruneSpec, features: Features, arithmetic: Arithmetic = "float32") -> Kept:
    with torch.no_grad():
        kept: Kept = method.module(spec, arithmetic).eval()(features)
    return kept


def _close(tokens: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.abs().max().clamp(min=1e-6))
    torch.testing.assert_close(tokens, expected, rtol=0.0, atol=1e-4 * scale)


def test_a_method_goes_by_its_name() -> None:
    assert all(method.name == name for name, method in METHODS.items())


@methods
@quick
@given(shape=_shapes(), images=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_module_keeps_what_the_loop_keeps(
    method: Method, shape: tuple[tuple[int, int], int], images: int, seed: int
) -> None:
    spec = PruneSpec(grid=shape[0], keep=shape[1], method=method.name)
    features = _features(spec, seed=seed, images=images)
    before = [x.clone() for x in (features.hidden, features.keys) if x is not None]
    trace, again = method.choose(features, spec), method.choose(features, spec)
    kept = _run(method, spec, features)
    for indices in (trace.indices, kept.indices):
        assert indices.shape == (images, spec.keep)
        assert indices.dtype == torch.int64
        assert bool((indices[:, 1:] > indices[:, :-1]).all()), "ascending, hence distinct"
        assert 0 <= int(indices.min()) <= int(indices.max()) < spec.tokens
    assert torch.equal(trace.indices, kept.indices)
    assert torch.equal(trace.indices, again.indices)
    assert torch.equal(trace.tokens, again.tokens)
    assert trace.tokens.shape == kept.tokens.shape == (images, spec.keep, WIDTH)
    _close(kept.tokens, trace.tokens)
    assert torch.equal(kept.filled, torch.zeros(images, 1))
    assert torch.equal(trace.order.sort().values, trace.indices)
    assert trace.margin.shape == trace.order.shape
    assert bool((trace.margin >= 0.0).all())
    assert bool(torch.isin(trace.marks, trace.indices).all())
    after = [x for x in (features.hidden, features.keys) if x is not None]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), "inputs stay as they were"
    if trace.recovery is None:
        assert torch.equal(trace.tokens, features.hidden.gather(1, trace.indices[..., None].expand(-1, -1, WIDTH)))


@methods
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_number_of_tokens_can_be_kept(method: Method, grid: tuple[int, int]) -> None:
    for keep in range(1, grid[0] * grid[1] + 1):
        spec = PruneSpec(grid=grid, keep=keep, method=method.name)
        features = _features(spec, seed=keep)
        kept, expected = _run(method, spec, features), method.choose(features, spec)
        assert kept.indices.tolist() == expected.indices.tolist()
        _close(kept.tokens, expected.tokens)


@methods
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_images_of_a_batch_do_not_meet(method: Method, arithmetic: Arithmetic) -> None:
    spec = PruneSpec(grid=(5, 6), keep=11, method=method.name)
    one, other = _features(spec, seed=1), _features(spec, seed=2)
    assert one.keys is not None
    assert other.keys is not None
    both = Features(hidden=torch.cat([one.hidden, other.hidden]), keys=torch.cat([one.keys, other.keys]))
    kept = _run(method, spec, both, arithmetic)
    for at, features in enumerate((one, other)):
        alone = _run(method, spec, features, arithmetic)
        assert torch.equal(kept.indices[at : at + 1], alone.indices)
        assert torch.equal(kept.filled[at : at + 1], alone.filled)
        _close(kept.tokens[at : at + 1], alone.tokens)


@methods
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(("grid", "keep", "images"), [((3, 5), 6, 1), ((3, 3), 9, 2), ((2, 7), 1, 1)])
@torch.no_grad()
def test_the_traced_program_is_static_and_equal(
    method: Method, arithmetic: Arithmetic, grid: tuple[int, int], keep: int, images: int
) -> None:
    spec = PruneSpec(grid=grid, keep=keep, method=method.name)
    features = _features(spec, seed=3, images=images)
    module = method.module(spec, arithmetic).eval()
    program = torch.export.export(module, (features,), strict=False)
    assert not program.range_constraints
    for node in program.graph.nodes:
        assert node.op in ("placeholder", "call_function", "output"), node
        if node.op == "call_function" and node.target is not operator.getitem:
            assert isinstance(node.target, torch._ops.OpOverload), f"control flow: {node.target}"
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if isinstance(value, torch.Tensor):
                assert all(type(side) is int for side in value.shape), node
                assert value.dtype != torch.int64, f"{node}: mobile delegates have no int64"
    tokens, indices, filled = program.module()(features)
    eager = module(features)
    assert torch.equal(indices.long(), eager.indices)
    assert indices.dtype in (torch.float32, torch.int32)
    assert filled.tolist() == eager.filled.tolist()
    _close(tokens, eager.tokens)
    assert module.state_dict() == {}, "constants are built, not saved"


@methods
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_what_has_no_answer_is_refused(method: Method, arithmetic: Arithmetic) -> None:
    spec = PruneSpec(grid=(3, 3), keep=4, method=method.name)
    good = _features(spec, seed=0)
    module = method.module(spec, arithmetic)
    broken = good.hidden.clone()
    broken[0, 2, 1] = torch.nan
    cases = [
        (good._replace(hidden=good.hidden[:, :8]), r"hidden has shape \(1, 8, 12\); expected \(B, 9, channels\)"),
        (good._replace(hidden=broken), "hidden holds 1 values that are NaN or infinite"),
        (good._replace(hidden=good.hidden.long()), "hidden has dtype"),
    ]
    if "keys" in method.needs:
        cases.append((good._replace(keys=None), f"method '{method.name}' needs keys"))
    for features, message in cases:
        with pytest.raises(SpecError, match=message):
            method.choose(features, spec)
        with pytest.raises(SpecError, match=message):
            module(features)


@methods
def test_features_that_are_not_needed_may_be_missing(method: Method) -> None:
    spec = PruneSpec(grid=(3, 3), keep=4, method=method.name)
    whole = _features(spec, seed=0)
    least = whole if "keys" in method.needs else Features(hidden=whole.hidden)
    assert torch.equal(method.choose(least, spec).indices, method.choose(whole, spec).indices)
    assert torch.equal(_run(method, spec, least).indices, _run(method, spec, whole).indices)


@methods
def test_settings_are_frozen_numbers_of_the_method_itself(method: Method) -> None:
    own = method.settings()
    assert dataclasses.is_dataclass(own)
    assert own == method.settings()
    assert hash(own) == hash(method.settings())
    spec = PruneSpec(grid=(3, 3), keep=4, method=method.name, settings=own)
    assert spec == dataclasses.replace(spec)
    numbers = settings_numbers(spec)
    assert numbers == settings_numbers(dataclasses.replace(spec, settings=None)), "None takes the defaults"
    assert all(type(value) in (int, float) for value in numbers.values())
    assert method.settings(**numbers) == own, "what a manifest holds says everything"
    for name in [field.name for field in dataclasses.fields(own)]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(own, name, 1)
        for wrong in ("much", True, float("nan"), -1e9):
            with pytest.raises(SpecError, match=f"{name}={wrong!r} must be "):
                method.settings(**{name: wrong})


@methods
def test_settings_of_another_method_are_refused(method: Method) -> None:
    @dataclasses.dataclass(frozen=True)
    class Others:
        strength: float = 1.0

    spec = PruneSpec(grid=(3, 3), keep=4, method=method.name, settings=Others())
    features = _features(spec, seed=0)
    calls: list[Any] = [lambda: method.choose(features, spec), lambda: settings_numbers(spec)]
    calls += [lambda name=name: method.module(spec, name) for name in ARITHMETICS]
    for call in calls:
        with pytest.raises(SpecError, match=f"are not those of method '{method.name}'; give a Settings"):
            call()
    elsewhere = dataclasses.replace(spec, method="somebody", settings=None)
    with pytest.raises(SpecError, match=f"the spec asks for method='somebody', this is '{method.name}'"):
        method.choose(features, elsewhere)


@methods
def test_an_unknown_arithmetic_is_refused(method: Method) -> None:
    wrong: Any = "bfloat16"
    with pytest.raises(SpecError, match="arithmetic='bfloat16' is not known; allowed: float32, float16"):
        method.module(PruneSpec(grid=(3, 3), keep=4, method=method.name), wrong)


@pytest.mark.parametrize("wrong", ["divprune", "VLM-Pruner"])
def test_an_unknown_method_is_refused(wrong: str) -> None:
    with pytest.raises(SpecError, match=f"method='{wrong}' is not known; allowed: vlm-pruner, uniform"):
        settings_numbers(PruneSpec(method=wrong))
    for nothing in ("", None):
        name: Any = nothing
        with pytest.raises(SpecError, match="must be the name of a method"):
            PruneSpec(method=name)


# What each method is beside the contract


def test_uniform_keeps_the_middles_of_equal_stretches() -> None:
    def kept(grid: tuple[int, int], keep: int) -> list[int]:
        spec = PruneSpec(grid=grid, keep=keep, method="uniform")
        indices: list[int] = METHODS["uniform"].choose(_features(spec, seed=0), spec).indices[0].tolist()
        return indices

    assert kept((4, 4), 1) == [8]
    assert kept((4, 4), 4) == [2, 6, 10, 14]
    assert kept((2, 5), 3) == [1, 5, 8]
    assert kept((2, 5), 10) == list(range(10))
    gaps = [after - before for before, after in zip(kept((24, 24), 64)[:-1], kept((24, 24), 64)[1:], strict=True)]
    assert set(gaps) == {9}


def test_uniform_names_more_tokens_than_float16_counts() -> None:
    spec = PruneSpec(grid=(46, 45), keep=2070, method="uniform")
    features = Features(hidden=torch.randn(1, spec.tokens, 2, generator=torch.Generator().manual_seed(0)))
    program = torch.export.export(METHODS["uniform"].module(spec, "float16"), (features,), strict=False)
    _, indices, _ = program.module()(features)
    assert indices.dtype == torch.int32
    assert indices[0].tolist() == list(range(2070))
