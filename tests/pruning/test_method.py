"""What every pruning method promises, whichever it is: one contract, and the settings it may be asked for."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning import ARITHMETICS, METHODS, Arithmetic, Features, Kept, Method, PruneSpec, SpecError, settings_numbers

pytestmark = pytest.mark.usefixtures("one_thread")

quick = settings(max_examples=30, deadline=None, derandomize=True)
KEY_WIDTH, WIDTH, ASKED = 7, 12, 3
# Square and not, one row, one column, one token.
GRIDS = [(4, 4), (3, 5), (1, 9), (7, 1), (1, 1)]
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
# Every static form that there is.
forms = pytest.mark.parametrize(
    ("method", "arithmetic"),
    [
        pytest.param(method, arithmetic, id=f"{name}-{arithmetic}")
        for name, method in METHODS.items()
        for arithmetic in method.arithmetics
    ],
)
static = pytest.mark.parametrize(
    "method", [method for method in METHODS.values() if method.arithmetics], ids=lambda method: method.name
)


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
        attention=torch.randn(images, spec.tokens, generator=chance).softmax(-1),
        question=torch.randn(images, ASKED, WIDTH, generator=chance),
    )


def _run(method: Method, spec: PruneSpec, features: Features, arithmetic: Arithmetic = "float32") -> Kept:
    with torch.no_grad():
        kept: Kept = method.module(spec, arithmetic).eval()(features)
    return kept


def _whole(features: Features) -> list[torch.Tensor]:
    """All tensors of features that lack none."""
    assert all(x is not None for x in features)
    return [x for x in features if x is not None]


def _without(features: Features, *names: str) -> Features:
    nothing: dict[str, Any] = dict.fromkeys(names)
    return features._replace(**nothing)


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
    before = [x.clone() for x in _whole(features)]
    trace, again = method.choose(features, spec), method.choose(features, spec)
    # What needs the question has no static form; the rest of the contract holds for it too.
    kept = _run(method, spec, features) if method.arithmetics else Kept(trace.tokens, trace.indices, torch.zeros(1, 1))
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
    assert not kept.filled.any()
    assert torch.equal(trace.order.sort().values, trace.indices)
    assert trace.margin.shape == trace.order.shape
    assert bool((trace.margin >= 0.0).all())
    assert bool(torch.isin(trace.marks, trace.indices).all())
    assert all(torch.equal(x, y) for x, y in zip(before, _whole(features), strict=True)), "inputs stay as they were"
    if trace.mix is not None:
        assert trace.recovery is None, "of two ways to make the rows one is told"
        _close(trace.tokens, trace.mix @ features.hidden)
    elif trace.recovery is None or not trace.recovery.share:
        assert torch.equal(trace.tokens, features.hidden.gather(1, trace.indices[..., None].expand(-1, -1, WIDTH)))


@static
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_number_of_tokens_can_be_kept(method: Method, grid: tuple[int, int]) -> None:
    for keep in range(1, grid[0] * grid[1] + 1):
        spec = PruneSpec(grid=grid, keep=keep, method=method.name)
        features = _features(spec, seed=keep)
        kept, expected = _run(method, spec, features), method.choose(features, spec)
        assert kept.indices.tolist() == expected.indices.tolist()
        _close(kept.tokens, expected.tokens)


def _alike(spec: PruneSpec) -> Features:
    """Tokens that nothing tells apart."""
    return Features(
        hidden=torch.full((1, spec.tokens, WIDTH), 0.5),
        keys=torch.full((1, spec.tokens, KEY_WIDTH), -0.25),
        attention=torch.full((1, spec.tokens), 1.0 / spec.tokens),
        question=torch.full((1, ASKED, WIDTH), 0.5),
    )


def _pairs(spec: PruneSpec) -> Features:
    """Every token twice, next to each other."""
    half = (spec.tokens + 1) // 2
    return Features(
        *(
            x if name == "question" else x[:, :half].repeat_interleave(2, 1)[:, : spec.tokens]
            for name, x in zip(Features._fields, _whole(_features(spec, seed=5)), strict=True)
        )
    )


DEGENERATE: dict[str, Callable[[PruneSpec], Features]] = {
    "zeros": lambda spec: Features(*(torch.zeros_like(x) for x in _whole(_alike(spec)))),
    "alike": _alike,
    "pairs": _pairs,
    "one channel": lambda spec: _features(spec, seed=6)._replace(
        hidden=_features(spec, seed=6).hidden[..., :1], keys=_features(spec, seed=7).hidden[..., :1]
    ),
    "one token": lambda spec: Features(
        *(torch.nn.functional.pad(x[:, :1], (0, 0) * (x.dim() - 2) + (0, x.shape[1] - 1)) for x in _whole(_alike(spec)))
    ),
}


@methods
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 9), (1, 1)], ids=str)
def test_as_many_distinct_tokens_stay_where_nothing_tells_them_apart(
    method: Method, kind: str, grid: tuple[int, int]
) -> None:
    count = grid[0] * grid[1]
    for keep in sorted({1, 2, (count + 1) // 2, count} & set(range(1, count + 1))):
        spec = PruneSpec(grid=grid, keep=keep, method=method.name)
        features = DEGENERATE[kind](spec)
        trace = method.choose(features, spec)
        for indices in (trace.indices, *([_run(method, spec, features).indices] if method.arithmetics else [])):
            assert len(set(indices[0].tolist())) == keep
            assert indices.tolist() == trace.indices.tolist()


@forms
def test_images_of_a_batch_do_not_meet(method: Method, arithmetic: Arithmetic) -> None:
    spec = PruneSpec(grid=(5, 6), keep=11, method=method.name)
    one, other = _features(spec, seed=1), _features(spec, seed=2)
    both = Features(*(torch.cat(pair) for pair in zip(_whole(one), _whole(other), strict=True)))
    kept = _run(method, spec, both, arithmetic)
    for at, features in enumerate((one, other)):
        alone = _run(method, spec, features, arithmetic)
        assert torch.equal(kept.indices[at : at + 1], alone.indices)
        assert torch.equal(kept.filled[at : at + 1], alone.filled)
        _close(kept.tokens[at : at + 1], alone.tokens)


@forms
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
def test_what_has_no_answer_is_refused(method: Method) -> None:
    spec = PruneSpec(grid=(3, 3), keep=4, method=method.name)
    good = _features(spec, seed=0)
    modules = [method.module(spec, arithmetic) for arithmetic in method.arithmetics]
    broken = good.hidden.clone()
    broken[0, 2, 1] = torch.nan
    cases = [
        (good._replace(hidden=good.hidden[:, :8]), r"hidden has shape \(1, 8, 12\); expected \(B, 9, channels\)"),
        (good._replace(hidden=broken), "hidden holds 1 values that are NaN or infinite"),
        (good._replace(hidden=good.hidden.long()), "hidden has dtype"),
    ]
    cases += [(_without(good, need), f"method '{method.name}' needs {need}") for need in method.needs]
    if "attention" in method.needs:
        assert good.attention is not None
        cases += [
            (good._replace(attention=good.attention - 0.5), "attention holds negative values"),
            (good._replace(attention=good.attention[:, :4]), r"attention has shape \(1, 4\); expected \(B, 9\)"),
            (good._replace(attention=good.attention.repeat(2, 1)), "attention holds 2 images and hidden 1"),
        ]
    for features, message in cases:
        with pytest.raises(SpecError, match=message):
            method.choose(features, spec)
        for module in modules:
            with pytest.raises(SpecError, match=message):
                module(features)


@methods
def test_features_that_are_not_needed_may_be_missing(method: Method) -> None:
    spec = PruneSpec(grid=(3, 3), keep=4, method=method.name)
    whole = _features(spec, seed=0)
    least = _without(whole, *(name for name in Features._fields[1:] if name not in method.needs))
    assert torch.equal(method.choose(least, spec).indices, method.choose(whole, spec).indices)
    if method.arithmetics:
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
    calls += [lambda name=name: method.module(spec, name) for name in method.arithmetics]
    for call in calls:
        kind = method.settings.__qualname__
        with pytest.raises(SpecError, match=f"are not those of method '{method.name}'; give a {kind}"):
            call()
    elsewhere = dataclasses.replace(spec, method="somebody", settings=None)
    with pytest.raises(SpecError, match=f"the spec asks for method='somebody', this is '{method.name}'"):
        method.choose(features, elsewhere)


@static
def test_an_arithmetic_without_a_form_is_refused(method: Method) -> None:
    spec = PruneSpec(grid=(3, 3), keep=4, method=method.name)
    unknown: Any = "bfloat16"
    with pytest.raises(SpecError, match="arithmetic='bfloat16' is not known; allowed: float32, float16"):
        method.module(spec, unknown)
    for arithmetic in set(ARITHMETICS) - set(method.arithmetics):
        with pytest.raises(SpecError, match=f"'{method.name}' has no static form for engines that compute in float16"):
            method.module(spec, arithmetic)


@pytest.mark.parametrize("wrong", ["pruner", "VLM-Pruner"])
def test_an_unknown_method_is_refused(wrong: str) -> None:
    with pytest.raises(SpecError, match=f"method='{wrong}' is not known; allowed: {', '.join(METHODS)}"):
        settings_numbers(PruneSpec(method=wrong))
    for nothing in ("", None):
        name: Any = nothing
        with pytest.raises(SpecError, match="must be the name of a method"):
            PruneSpec(method=name)
