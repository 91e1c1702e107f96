"""What the pruner promises for any features: validation, exactly `keep` tokens, both forms alike, static in a trace."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pruning import PruneSpec, SpecError, TokenPruner, reference
from pruning.vlm_pruner.settings import Settings

Features = tuple[Tensor, Tensor]
MakeFeatures = Callable[[int, int, int, int], Features]
Prune = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# All that may appear in a traced pruner. Nothing here sorts, indexes, compares or depends on data for its shape.
STATIC_OPERATORS = {
    "abs",
    "add",
    "bmm",
    "cat",
    "clamp",
    "div",
    "max_pool2d",
    "minimum",
    "mul",
    "pad",
    "permute",
    "reshape",
    "rsub",
    "slice",
    "softmax",
    "sqrt",
    "sub",
    "to",
    "transpose",
    "view",
}
pytestmark = pytest.mark.usefixtures("one_thread")

# What tracing itself adds: a check of dtypes that lowering drops, and a constant once per image.
FROM_TRACING = {"_assert_tensor_metadata", "expand"}


def _normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed))


def _whole(count: int, width: int, low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high + 1, (1, count, width), generator=torch.Generator().manual_seed(seed)).float()


def _random(count: int, dk: int, d: int, seed: int) -> Features:
    return _normal(count, dk, seed), _normal(count, d, seed + 1)


def _huge(count: int, dk: int, d: int, seed: int) -> Features:
    return _normal(count, dk, seed) * 1e3, _normal(count, d, seed + 1) * 1e3


def _small(count: int, dk: int, d: int, seed: int) -> Features:
    return _normal(count, dk, seed) * 1e-3, _normal(count, d, seed + 1) * 1e-3


def _blobs(count: int, dk: int, d: int, seed: int) -> Features:
    """Tokens near one of three centres, so that several thresholds are needed."""
    centre = _whole(count, 1, 0, 2, seed + 2).long().flatten()
    return _normal(count, dk, seed), _normal(3, d, seed + 3)[:, centre] + 0.05 * _normal(count, d, seed + 1)


def _zeros(count: int, dk: int, d: int, seed: int) -> Features:
    return torch.zeros(1, count, dk), torch.zeros(1, count, d)


def _onehot(count: int, dk: int, d: int, seed: int) -> Features:
    keys, hidden = _whole(count, 1, 0, dk - 1, seed), _whole(count, 1, 0, d - 1, seed + 1)
    return functional.one_hot(keys[..., 0].long(), dk).float(), functional.one_hot(hidden[..., 0].long(), d).float()


def _integers(count: int, dk: int, d: int, seed: int) -> Features:
    """Every sum, norm and cosine is exact: four entries of +-1 per token have the norm 2. Almost everything ties."""
    width = max(d, 4)
    order = torch.rand(count, width, generator=torch.Generator().manual_seed(seed)).argsort(dim=-1)
    sign = 2.0 * _whole(count, width, 0, 1, seed + 1) - 1.0
    return _whole(count, dk, -2, 2, seed + 2), (order < 4).float()[None] * sign


def _constant(count: int, dk: int, d: int, seed: int) -> Features:
    keys, hidden = _integers(1, dk, d, seed)
    return keys.repeat(1, count, 1), hidden.repeat(1, count, 1)


def _duplicates(count: int, dk: int, d: int, seed: int) -> Features:
    keys, hidden = _integers(max(1, count // 3), dk, d, seed)
    source = _whole(count, 1, 0, keys.shape[1] - 1, seed + 3).long().flatten()
    return keys[:, source], hidden[:, source]


def _mostly_zero(count: int, dk: int, d: int, seed: int) -> Features:
    keys, hidden = _integers(count, dk, d, seed)
    mask = (_normal(count, 1, seed + 3) > 0.6).float()
    return keys * mask, hidden * mask


GENERIC: tuple[MakeFeatures, ...] = (_random, _huge, _small, _blobs)
# Ties by the dozen, in numbers that every order of summation adds up alike: the first of equals must win everywhere.
TIED: tuple[MakeFeatures, ...] = (
    _zeros,
    _onehot,
    _integers,
    _constant,
    _duplicates,
    _mostly_zero,
)


def _close(tokens: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max().clamp(min=1e-6))
    torch.testing.assert_close(tokens, expected, rtol=0.0, atol=1e-4 * scale)


def _assert_kept(spec: PruneSpec, tokens: Tensor, indices: Tensor, hidden: Tensor) -> None:
    """Exactly `keep`, ascending (hence distinct), in range."""
    assert tokens.shape == (len(hidden), spec.keep, hidden.shape[2])
    assert indices.shape == (len(hidden), spec.keep)
    assert indices.dtype == torch.int64
    assert bool(torch.isfinite(tokens).all())
    assert bool((indices[:, 1:] > indices[:, :-1]).all())
    assert int(indices.min()) >= 0
    assert int(indices.max()) < spec.tokens


@torch.no_grad()
def _assert_alike(spec: PruneSpec, keys: Tensor, hidden: Tensor) -> None:
    tokens, indices = TokenPruner(spec)(keys, hidden)
    expected_tokens, expected_indices = reference.prune(keys, hidden, spec)
    _assert_kept(spec, expected_tokens, expected_indices, hidden)
    _assert_kept(spec, tokens, indices, hidden)
    assert indices.tolist() == expected_indices.tolist()
    _close(tokens, expected_tokens)


BAD_SPECS: list[tuple[dict[str, Any], str]] = [
    ({"grid": (0, 4)}, r"grid=\(0, 4\) must be two positive whole numbers"),
    ({"grid": (4,)}, r"grid=\(4,\) must be two positive whole numbers"),
    ({"grid": (4, 4, 4)}, r"grid=\(4, 4, 4\) must be two"),
    ({"grid": (2.5, 4)}, r"grid=\(2.5, 4\) must be two"),
    ({"grid": (True, 4)}, r"grid=\(True, 4\) must be two"),
    ({"grid": "24"}, r"grid='24' must be two"),
    ({"grid": 24}, r"grid=24 must be two"),
    ({"grid": None}, r"grid=None must be two"),
    ({"grid": (100, 100), "keep": 4}, r"a 100 x 100 grid has 10000 tokens; at most 8192"),
    ({"overview": (2, 0)}, r"overview=\(2, 0\) must be two"),
    ({"overview": (2, 3), "keep": 583}, r"1\.\.582 \(the image tokens of a 24 x 24 grid behind an overview of 2 x 3\)"),
    ({"keep": 0}, r"keep=0 must be a whole number of at least 1"),
    ({"keep": -3}, r"keep=-3 must be a whole number of at least 1"),
    ({"keep": 577}, r"keep=577 must lie in 1\.\.576 \(the image tokens of a 24 x 24 grid\)"),
    ({"keep": 6.0}, r"keep=6.0 must be a whole number"),
    ({"keep": "6"}, r"keep='6' must be a whole number"),
    ({"keep": True}, r"keep=True must be a whole number"),
    ({"pivots": 0}, r"pivots=0 must be a whole number of at least 1"),
    ({"token_batch": 0}, r"token_batch=0 must be a whole number of at least 1"),
    ({"channels": 0}, r"channels=0 must be a whole number of at least 1"),
    ({"steps": 0}, r"steps=0 must be a whole number of at least 1, or None"),
    ({"threshold": 2.5}, r"threshold=2.5 must be a number in -1\.\.2"),
    ({"threshold": float("nan")}, r"threshold=nan must be a number in -1\.\.2"),
    ({"threshold": "high"}, r"threshold='high' must be a number"),
    ({"threshold": True}, r"threshold=True must be a number"),
    ({"threshold_step": 0.0}, r"threshold_step=0.0 must be a number in 0\.01\.\.1"),
    ({"distance_weight": -0.1}, r"distance_weight=-0.1 must be a number in 0\.\.4"),
    ({"recovery": 1.1}, r"recovery=1.1 must be a number in 0\.\.1"),
]


@pytest.mark.parametrize(("values", "message"), BAD_SPECS, ids=[str(values) for values, _ in BAD_SPECS])
def test_a_spec_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        (PruneSpec if values.keys() <= {"grid", "overview", "keep"} else Settings)(**values)


def test_a_spec_is_a_frozen_value() -> None:
    spec = PruneSpec(grid=(3, 5), keep=4)
    assert spec.tokens == 15
    assert spec == PruneSpec(grid=(3, 5), keep=4)
    assert hash(spec) == hash(PruneSpec(grid=(3, 5), keep=4))
    assert isinstance(SpecError("x"), ValueError)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.keep = 5  # type: ignore[misc]


@pytest.mark.parametrize("form", ["reference", "static"])
@pytest.mark.parametrize(
    ("keys", "hidden", "message"),
    [
        ((9, 4), (1, 9, 6), r"keys has shape \(9, 4\); expected \(B, 9, channels\) for a 3 x 3 grid"),
        ((1, 8, 4), (1, 9, 6), r"keys has shape \(1, 8, 4\); expected \(B, 9"),
        ((1, 9, 4), (1, 10, 6), r"hidden has shape \(1, 10, 6\); expected \(B, 9"),
        ((1, 9, 0), (1, 9, 6), r"keys has shape \(1, 9, 0\)"),
        ((2, 9, 4), (1, 9, 6), r"keys hold 2 images and hidden 1"),
    ],
)
def test_shapes_that_do_not_fit(form: str, keys: tuple[int, ...], hidden: tuple[int, ...], message: str) -> None:
    spec = PruneSpec(grid=(3, 3), keep=4)
    call: Prune = TokenPruner(spec) if form == "static" else lambda k, h: reference.prune(k, h, spec)
    with pytest.raises(SpecError, match=message):
        call(torch.zeros(keys), torch.zeros(hidden))


@pytest.mark.parametrize("form", ["reference", "static"])
@pytest.mark.parametrize("name", ["keys", "hidden"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite(form: str, name: str, value: float) -> None:
    spec = PruneSpec(grid=(3, 3), keep=4)
    features = dict(zip(("keys", "hidden"), _random(9, 4, 6, 0), strict=True))
    features[name][0, 2, 1] = value
    features[name][0, 5, 0] = value
    with pytest.raises(SpecError, match=f"{name} holds 2 values that are NaN or infinite; only finite features"):
        if form == "static":
            TokenPruner(spec)(features["keys"], features["hidden"])
        else:
            reference.prune(features["keys"], features["hidden"], spec)


def test_features_that_are_no_floats_or_too_wide() -> None:
    spec = PruneSpec(grid=(2, 2), keep=2)
    whole = torch.zeros(1, 4, 3, dtype=torch.int64)
    for call in (TokenPruner(spec), lambda k, h: reference.prune(k, h, spec)):
        with pytest.raises(SpecError, match=r"keys has dtype torch\.int64; expected float16"):
            call(whole, torch.zeros(1, 4, 3))
    with pytest.raises(SpecError, match=r"hidden are 16385 wide; the static pruner covers at most 16384"):
        TokenPruner(spec)(torch.zeros(1, 4, 3), torch.zeros(1, 4, 16385))


@torch.no_grad()
def test_keys_beyond_the_static_range_are_refused() -> None:
    """Up to the bound both forms agree; beyond it the static one would overflow to NaN without a word."""
    spec = PruneSpec(grid=(5, 6), keep=12)
    keys, hidden = _random(30, 10, 12, 1)
    keys = keys / keys.abs().max()
    _assert_alike(spec, keys * 1.9e9, hidden)
    for scale in (2e9, 1e12, 1e18):
        with pytest.raises(SpecError, match=r"keys reach .*; the static pruner tells distances apart up to 1\.92e\+09"):
            TokenPruner(spec)(keys * scale, hidden)


@st.composite
def specs(draw: st.DrawFn) -> PruneSpec:
    """Small grids with everything the paper's ablations vary, and beyond: pivots > keep, token_batch > N."""
    grid = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    return PruneSpec(
        grid=grid,
        keep=draw(st.integers(1, grid[0] * grid[1])),
        settings=Settings(
            pivots=draw(st.integers(1, 8)),
            token_batch=draw(st.integers(1, 32)),
            threshold=draw(st.floats(0.6, 1.0)),
            channels=draw(st.sampled_from((1, 3, 8, 256))),
        ),
    )


def _set(spec: PruneSpec, **words: Any) -> PruneSpec:
    """The spec with other settings."""
    return dataclasses.replace(spec, settings=dataclasses.replace(Settings.of(spec), **words))


seeds = st.integers(0, 2**31)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def _comparable(spec: PruneSpec, make: MakeFeatures, width: int) -> PruneSpec:
    """The spec, with all channels unless the choice among tied channels is exact arithmetic too.

    Variances are sums over N tokens of squares over N: exact where N is a power of two. What is left of a token must
    have an exact norm: one-hot ones have, those with four entries of +-1 may be left with three.
    """
    exact = make in (_zeros, _onehot) and not spec.tokens & (spec.tokens - 1)
    return spec if exact else _set(spec, channels=max(Settings.of(spec).channels, width))


@quick
@given(specs(), st.sampled_from(GENERIC), st.integers(1, 12), st.integers(1, 16), seeds)
def test_both_forms_keep_the_same(spec: PruneSpec, features: MakeFeatures, dk: int, d: int, seed: int) -> None:
    _assert_alike(spec, *features(spec.tokens, dk, d, seed))


@quick
@given(specs(), st.sampled_from(TIED), st.integers(1, 12), st.integers(1, 16), seeds)
def test_both_forms_break_ties_alike(spec: PruneSpec, features: MakeFeatures, dk: int, d: int, seed: int) -> None:
    keys, hidden = features(spec.tokens, dk, d, seed)
    _assert_alike(_comparable(spec, features, hidden.shape[2]), keys, hidden)


def test_both_forms_keep_the_same_on_a_thousand_grids() -> None:
    chance = random.Random(2512)
    for number in range(1000):
        rows, columns = chance.choice([(1, 24), (24, 1), (2, 10), (6, 6), (8, 8)])
        grid = (chance.randint(1, rows), chance.randint(1, columns))
        spec = PruneSpec(
            grid=grid,
            keep=chance.randint(1, grid[0] * grid[1]),
            settings=Settings(
                pivots=chance.randint(1, 8),
                threshold=chance.uniform(0.6, 1.0),
                token_batch=chance.choice((1, 2, 4, 7, 16, 32, 40)),
                channels=chance.choice((1, 4, 12, 256)),
            ),
        )
        make = chance.choice(GENERIC + TIED)
        keys, hidden = make(spec.tokens, chance.randint(1, 20), chance.randint(1, 30), chance.randrange(2**31))
        if make in TIED:
            spec = _comparable(spec, make, hidden.shape[2])
        try:
            _assert_alike(spec, keys, hidden)
        except AssertionError as err:
            raise AssertionError(f"grid {number}: {make.__name__}, {spec}: {err}") from err


@quick
@given(specs(), st.booleans(), seeds)
@torch.no_grad()
def test_duplicates_of_any_numbers_still_give_exactly_keep(spec: PruneSpec, constant: bool, seed: int) -> None:
    """Rounding may decide between equals here, so the forms may differ; counts and order may not."""
    keys, hidden = _random(1 if constant else max(1, spec.tokens // 3), 7, 9, seed)
    source = _whole(spec.tokens, 1, 0, keys.shape[1] - 1, seed + 3).long().flatten()
    keys, hidden = keys[:, source], hidden[:, source]
    for tokens, indices in (reference.prune(keys, hidden, spec), TokenPruner(spec)(keys, hidden)):
        _assert_kept(spec, tokens, indices, hidden)
        if constant:  # a mean of equal tokens is that token
            _close(tokens, hidden[:, : spec.keep])


@quick
@given(specs(), seeds)
@torch.no_grad()
def test_order_of_channels_does_not_matter(spec: PruneSpec, seed: int) -> None:
    keys, hidden = _random(spec.tokens, 7, 12, seed)
    chance = torch.Generator().manual_seed(seed)
    of_keys, of_hidden = torch.randperm(7, generator=chance), torch.randperm(12, generator=chance)
    for prune in (TokenPruner(spec), lambda k, h: reference.prune(k, h, spec)):
        tokens, indices = prune(keys, hidden)
        permuted_tokens, permuted_indices = prune(keys[..., of_keys], hidden[..., of_hidden])
        assert torch.equal(permuted_indices, indices)
        _close(permuted_tokens, tokens[..., of_hidden])


@quick
@given(specs(), st.integers(-8, 8), seeds)
@torch.no_grad()
def test_scaling_hidden_by_a_power_of_two_scales_the_tokens(spec: PruneSpec, exponent: int, seed: int) -> None:
    keys, hidden = _random(spec.tokens, 7, 12, seed)
    for prune in (TokenPruner(spec), lambda k, h: reference.prune(k, h, spec)):
        tokens, indices = prune(keys, hidden)
        scaled_tokens, scaled_indices = prune(keys, hidden * 2.0**exponent)
        assert torch.equal(scaled_indices, indices)
        assert torch.equal(scaled_tokens, tokens * 2.0**exponent)


@quick
@given(specs(), seeds)
@torch.no_grad()
def test_inputs_stay_as_they_were_and_images_do_not_meet(spec: PruneSpec, seed: int) -> None:
    keys = torch.cat([_normal(spec.tokens, 5, seed), _normal(spec.tokens, 5, seed + 1)])
    hidden = torch.cat([_normal(spec.tokens, 9, seed + 2), 3.0 * _normal(spec.tokens, 9, seed + 3)])
    before = keys.clone(), hidden.clone()
    for prune in (TokenPruner(spec), lambda k, h: reference.prune(k, h, spec)):
        tokens, indices = prune(keys, hidden)
        assert torch.equal(keys, before[0])
        assert torch.equal(hidden, before[1])
        for image in range(2):
            alone = prune(keys[image : image + 1], hidden[image : image + 1])
            assert torch.equal(indices[image : image + 1], alone[1])
            _close(tokens[image : image + 1], alone[0])


@pytest.mark.parametrize("make", GENERIC + TIED, ids=lambda make: make.__name__.strip("_"))
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (3, 4)])
def test_keeping_all_changes_nothing(make: MakeFeatures, grid: tuple[int, int]) -> None:
    count = grid[0] * grid[1]
    keys, hidden = make(count, 6, 9, 3)
    spec = PruneSpec(grid=grid, keep=count, settings=Settings(channels=5))
    for tokens, indices in (reference.prune(keys, hidden, spec), TokenPruner(spec)(keys, hidden)):
        assert torch.equal(indices, torch.arange(count)[None])
        assert torch.equal(tokens, hidden)


@quick
@given(specs(), st.sampled_from(GENERIC + TIED), seeds)
@torch.no_grad()
def test_sure_steps_never_run_out(spec: PruneSpec, features: MakeFeatures, seed: int) -> None:
    keys, hidden = features(spec.tokens, 6, 9, seed)
    enough = _set(spec, steps=max(1, Settings.of(spec).sure_steps(spec.keep)))
    assert TokenPruner(enough).select(keys, hidden)[2].tolist() == [[0.0]]


@pytest.mark.parametrize("make", [_random, _blobs, _integers, _constant], ids=lambda make: make.__name__.strip("_"))
@torch.no_grad()
def test_too_few_steps_are_counted_and_still_give_keep(make: MakeFeatures) -> None:
    spec = PruneSpec(grid=(6, 6), keep=20, settings=Settings(pivots=2, token_batch=4))
    keys, hidden = make(36, 8, 12, 5)
    pivots = set(reference.trace(keys, hidden, spec).marks[0].tolist())
    counts = []
    own = Settings.of(spec)
    for steps in range(1, own.sure_steps(spec.keep) + 1):
        tokens, indices, filled = TokenPruner(_set(spec, steps=steps)).select(keys, hidden)
        assert filled.dtype == torch.float32
        _assert_kept(spec, tokens, indices, hidden)
        assert pivots <= set(indices[0].tolist())
        counts.append(filled.item())
    assert counts[0] >= spec.keep - own.pivots - own.token_batch, "one step takes at most one batch"
    assert counts == sorted(counts, reverse=True), "more steps never fill more"
    assert counts[-1] == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tokens_have_the_dtype_of_hidden(dtype: torch.dtype) -> None:
    spec = PruneSpec(grid=(4, 4), keep=5, settings=Settings(pivots=2))
    keys, hidden = _random(16, 6, 9, 8)
    for key_dtype in (torch.float16, torch.float32):
        for prune in (TokenPruner(spec), lambda k, h: reference.prune(k, h, spec)):
            tokens, indices = prune(keys.to(key_dtype), hidden.to(dtype))
            assert tokens.dtype == dtype
            assert indices.dtype == torch.int64
            torch.testing.assert_close(tokens, reference.prune(keys.to(key_dtype), hidden.to(dtype), spec)[0])


@quick
@given(specs(), st.sampled_from((_random, _blobs, _integers)), seeds)
def test_keeping_fewer_keeps_a_subset(spec: PruneSpec, features: MakeFeatures, seed: int) -> None:
    """The count cuts the last batch by score, so what fewer tokens keep is always among what more tokens keep.

    The order of selection agrees up to that batch: inside it, it is by score where the count cut and by position
    where it did not.
    """
    keys, hidden = features(spec.tokens, 6, 9, seed)
    more, own = reference.trace(keys, hidden, spec), Settings.of(spec)
    for keep in range(1, spec.keep):
        fewer = reference.trace(keys, hidden, dataclasses.replace(spec, keep=keep))
        assert set(fewer.indices[0].tolist()) <= set(more.indices[0].tolist())
        agreed = max(min(own.pivots, keep), keep - own.token_batch)
        assert fewer.order[0, :agreed].tolist() == more.order[0, :agreed].tolist()
        if own.token_batch == 1:
            assert fewer.order[0].tolist() == more.order[0, :keep].tolist()


@quick
@given(specs(), st.sampled_from(GENERIC + TIED), seeds)
def test_trace_tells_order_pivots_and_margins(spec: PruneSpec, features: MakeFeatures, seed: int) -> None:
    keys, hidden = features(spec.tokens, 6, 9, seed)
    trace = reference.trace(keys, hidden, spec)
    assert torch.equal(trace.order.sort().values, trace.indices)
    assert torch.equal(trace.marks, trace.order[:, : min(Settings.of(spec).pivots, spec.keep)])
    assert trace.marks[0, 0] == keys[0].abs().sum(-1).argmax()
    assert trace.margin.shape == trace.order.shape
    assert trace.margin.dtype == torch.float32
    assert bool((trace.margin >= 0.0).all())


# Fewer channels than the features have, one step, one batch, one token, a batch of images: every branch of the graph.
TRACED: list[tuple[PruneSpec, int]] = [
    (PruneSpec(grid=(4, 4), keep=6, settings=Settings(pivots=3, token_batch=4, channels=5)), 1),
    (PruneSpec(grid=(4, 4), keep=6, settings=Settings(pivots=3, token_batch=32)), 1),
    (PruneSpec(grid=(4, 4), keep=2, settings=Settings(pivots=4)), 1),
    (PruneSpec(grid=(1, 1), keep=1), 1),
    (PruneSpec(grid=(3, 5), keep=15, settings=Settings(token_batch=1)), 1),
    (PruneSpec(grid=(4, 4), keep=6, settings=Settings(pivots=3, token_batch=4, channels=5)), 2),
]


@pytest.mark.parametrize(("spec", "images"), TRACED, ids=[f"{s.grid}-{s.keep}-x{b}" for s, b in TRACED])
@torch.no_grad()
def test_traced_program_is_static(spec: PruneSpec, images: int) -> None:
    keys, hidden = (x.repeat(images, 1, 1) for x in _random(spec.tokens, 6, 9, 2))
    program = torch.export.export(TokenPruner(spec), (keys, hidden), strict=False)
    assert not program.range_constraints
    used = set()
    for node in program.graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if isinstance(value, Tensor):
                assert all(type(side) is int for side in value.shape), node
                assert value.dtype == torch.float32, node
        if node.op == "call_function":
            assert isinstance(node.target, torch._ops.OpOverload), f"control flow: {node.target}"
            used.add(str(node.target).split(".")[1])
        assert node.op in ("placeholder", "call_function", "output"), node
    assert used - FROM_TRACING <= STATIC_OPERATORS
    tokens, indices = program.module()(keys, hidden)
    expected_tokens, expected_indices = reference.prune(keys, hidden, spec)
    assert torch.equal(indices.long(), expected_indices)
    _close(tokens, expected_tokens)


class NothingRead(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that run, and refuses any that is not of the static ones: no value leaves the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name not in IN_EAGER or (kwargs or {}).get("device") is not None:
            raise AssertionError(f"{name} may not run while a CUDA graph is recorded")
        self.used.add(name)
        return func(*args, **(kwargs or {}))


# What the static operators are called once torch has taken them apart; `_to_copy` changes the dtype alone.
IN_EAGER = STATIC_OPERATORS | {
    "_softmax",
    "_to_copy",
    "_unsafe_view",
    "clone",
    "constant_pad_nd",
    "expand",
    "max_pool2d_with_indices",
    "transpose",
}


@pytest.mark.parametrize(("spec", "images"), TRACED, ids=[f"{s.grid}-{s.keep}-x{b}" for s, b in TRACED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_no_value_is_read_while_a_graph_is_recorded(spec: PruneSpec, images: int, dtype: torch.dtype) -> None:
    keys, hidden = (x.repeat(images, 1, 1).to(dtype) for x in _random(spec.tokens, 6, 9, 2))
    pruner = TokenPruner(spec)
    expected = pruner.select(keys, hidden)
    with NothingRead() as watch:
        tokens, indices, filled = pruner.select_unread(keys, hidden)
    assert "bmm" in watch.used
    assert torch.equal(tokens, expected[0])
    assert torch.equal(indices.long(), expected[1])
    assert torch.equal(filled, expected[2])
    with pytest.raises(AssertionError, match="may not run while"), NothingRead():
        pruner.select(keys, hidden)  # which looks at the features first


@torch.no_grad()
def test_shapes_follow_from_shapes_alone() -> None:
    spec = PruneSpec(grid=(4, 6), keep=5, settings=Settings(channels=7))
    pruner, shapes = TokenPruner(spec), ShapeEnv()
    with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True):
        keys, hidden = torch.empty(2, spec.tokens, 6), torch.empty(2, spec.tokens, 9, dtype=torch.float16)
        tokens, indices, filled = pruner.select_unread(keys, hidden)
        with pytest.raises(DataDependentOutputException):
            torch.equal(keys, keys)  # as it would be if anything were read
    assert (tokens.shape, tokens.dtype) == ((2, 5, 9), torch.float16)
    assert (indices.shape, filled.shape) == ((2, 5), (2, 1))
    assert not shapes.pending_fresh_unbacked_symbols
    assert not shapes.var_to_range


def test_constants_are_not_saved() -> None:
    module = TokenPruner(PruneSpec(grid=(4, 4), keep=6))
    assert module.state_dict() == {}
    assert list(module.parameters()) == []


@pytest.mark.parametrize("keep", [1, 4, 5, 9])
@pytest.mark.parametrize("channels", [4, 16, 256])
def test_no_constant_is_empty(keep: int, channels: int) -> None:
    """ExecuTorch writes no tensor without elements; without steps, and of one batch, some would have none."""
    constants = dict(
        TokenPruner(PruneSpec(grid=(3, 3), keep=keep, settings=Settings(channels=channels))).named_buffers()
    )
    assert [name for name, constant in constants.items() if not constant.numel()] == []


@pytest.mark.parametrize("width", [17, 257, 300, 4096])
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 128, 256])
def test_channels_of_largest_variance_come_together(width: int, channels: int) -> None:
    """Whatever the widths are multiples of: the products of the brought-together channels are those of the chosen."""
    if channels >= width:
        channels = width - 1
    spec = PruneSpec(grid=(6, 6), keep=10, settings=Settings(channels=channels))
    chance = torch.Generator().manual_seed(width + channels)
    hidden = torch.randn(2, 36, width, generator=chance) * torch.rand(width, generator=chance) * 3.0
    pruner = TokenPruner(spec)
    place = pruner._channel_places(hidden)
    compact = pruner._compact(hidden, place)
    assert compact.shape[2] < channels + 16
    for image, places, brought in zip(hidden, place, compact, strict=True):
        chosen = torch.nonzero(places[0] < width).flatten()
        assert chosen.tolist() == image.var(0).topk(channels).indices.sort().values.tolist()
        assert places[0, chosen].tolist() == list(range(channels))
        torch.testing.assert_close(brought @ brought.T, image[:, chosen] @ image[:, chosen].T, rtol=1e-4, atol=1e-3)
