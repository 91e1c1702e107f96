"""How near an engine's outputs are to the desktop's: one definition of each metric, and the bounds they must meet."""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec
import numpy as np

from runtime.bundle import GraphInfo, Manifest
from runtime.check.recovery import Moved, Recovery
from runtime.errors import BundleError
from runtime.golden import KEPT_ALTERNATIVES, KEPT_INDICES, KEPT_MARGIN, KEPT_ORDER, graph_output, input_key, step_label
from runtime.text_graphs import TEXT_PREFILL, TOKEN_EMBEDDING

# Below this norm a tensor counts as zero, so that relative errors stay finite numbers that JSON can hold.
_TINY = 1e-12
# The golden's own rows, in float32, against those in float64: where weights all but cancel, rounding grows a
# thousandfold.
_MOST_REL_OF_GOLDEN = 1e-3


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What parity.json is made of."""


class Bound(_Record, frozen=True):
    """What one precision must reach. None: that metric is reported, not judged.

    `resolution` is the difference of two similarities below which it cannot tell which one is larger: 0.4 of the
    relative error of its features. That is how far noise moved such differences where it left the channels alone that
    similarities are taken on, in the worst of 48 golden cases, from 1e-6 to 2.5e-2 of noise.
    `accumulator_bits`: in how many bits the engine adds float16 products up; None where nothing is float16.
    """

    precision: str
    most_rel: float | None
    least_cosine: float | None
    least_overlap: float
    resolution: float
    reason: str
    accumulator_bits: int | None = None


# What fp16 is judged by where the engine at hand was measured to add float16 products up in 16 bits.
SUMS_IN_16_BITS = "fp16-sums16"

BOUNDS: dict[str, Bound] = {
    bound.precision: bound
    for bound in (
        Bound(
            precision="fp32",
            most_rel=2e-5,
            least_cosine=None,
            least_overlap=1.0,
            resolution=8e-6,
            reason="Same arithmetic in another order of summation: engines reach 2e-6 on a full vision tower, an error "
            "in one layer shows above 1e-3. The choice of tokens has no excuse to differ.",
        ),
        Bound(
            precision="fp16",
            most_rel=5e-3,
            least_cosine=None,
            least_overlap=0.87,
            resolution=2e-3,
            accumulator_bits=32,
            reason="Sums in 32 bits; 11 bits of mantissa through some 25 layers: a full tower was measured at 1.7e-3 "
            "on x86 without float16 arithmetic, a narrow one at 4.5e-4 on an emulated Cortex-A72. Near-ties fall the "
            "other way, and one changed choice moves those after it: with noise of 5e-3 on the features of 48 golden "
            "cases, 19 of 20 selections overlapped the clean one by more than this, the median by 0.98.",
        ),
        Bound(
            precision=SUMS_IN_16_BITS,
            most_rel=5e-2,
            least_cosine=None,
            least_overlap=0.33,
            resolution=2e-2,
            accumulator_bits=16,
            reason="Sums in 16 bits, as phones have them since Armv8.2 and x86 with AVX512-FP16: each addition rounds. "
            "A narrow tower of full depth was measured at 2.4e-2 in the Arm kernels on an emulated Cortex-A76 and at "
            "7.9e-3 in those of x86, there the full width at 1.6e-2, twice as much: twice 2.4e-2 is what the full "
            "width may come to on a phone. The emulated one kept 0.73 of the desktop's tokens. With noise of 5e-2 on "
            "the features of ten golden cases, six times each, 19 of 20 selections overlapped the clean one by more "
            "than this, the median by 0.59.",
        ),
        Bound(
            precision="a16w8",
            most_rel=None,
            least_cosine=0.97,
            least_overlap=0.43,
            resolution=1e-2,
            reason="8-bit weights with one scale a tensor, 16-bit activations: pocket's unpruned vision graph was "
            "measured at 2.6e-2 to 3.3e-2 relative on eight photos, a cosine of 0.9994; where a dropped token is "
            "recovered into another kept one, `hidden` came to 0.15, 0.989. With noise of 2.5e-2 on the features of "
            "ten golden cases, 19 of 20 selections overlapped the clean one by more than this, the median by 0.89.",
        ),
        Bound(
            precision="8da8w",
            most_rel=None,
            least_cosine=0.99,
            least_overlap=0.47,
            resolution=1e-2,
            reason="8-bit weights and activations: a full tower was measured at 1.5e-2 relative, a cosine of 0.9999; "
            "0.99 leaves room for wider ones. With noise of 1.5e-2 on the features of 48 golden cases, 19 of 20 "
            "selections overlapped the clean one by more than this, the median by 0.94.",
        ),
        Bound(
            precision="8da4w",
            most_rel=None,
            least_cosine=0.9,
            least_overlap=0.47,
            resolution=6e-2,
            reason="4-bit weights and 8-bit activations: a decoder of four layers with Gaussian weights in groups of "
            "32 was measured at 0.988 for its logits, a relative error of 0.15; deeper ones and larger groups drift "
            "further. What it costs is in the perplexity and in the share of equal next tokens, which stand beside it.",
        ),
        Bound(
            precision="int8",
            most_rel=None,
            least_cosine=0.99,
            least_overlap=0.47,
            resolution=6e-3,
            reason="8-bit weights, a scale for each row (Core ML) or for 32 of them (ONNX Runtime): pocket, whose "
            "weights are Gaussian, was measured at 1.5e-2 relative in its vision graph, a cosine of 0.9999, the logits "
            "of 4 layers at 0.9999, those of 32 layers at 0.9993. The choice of tokens is as with 8da8w.",
        ),
        Bound(
            precision="int4",
            most_rel=None,
            least_cosine=0.8,
            least_overlap=0.1,
            resolution=9e-2,
            reason="4-bit weights, one scale for 32: pocket's logits were measured at 0.984 to 0.990. Those of 32 "
            "layers with Gaussian weights, which have no favourite among the next tokens, came to 0.91, in groups of "
            "128 to 0.86; integers in the wrong order leave nothing. A vision graph with a tower of 4-bit weights came "
            "to 0.974, 0.22 relative: with such noise on the features of 48 golden cases, 19 of 20 selections shared "
            "0.14 of their tokens with the clean one or more, the median 0.40.",
        ),
        Bound(
            precision="pal4",
            most_rel=None,
            least_cosine=0.8,
            least_overlap=0.1,
            resolution=9e-2,
            reason="4-bit palettes, one for 16 rows: pocket was measured as with int4, 0.973 in its vision graph and "
            "0.988 for its logits; so is the choice of tokens.",
        ),
    )
}


def bound_for(graph: GraphInfo, *, accumulator_bits: int = 32) -> Bound:
    """The bound of the coarsest arithmetic in a graph; BundleError for one that has none.

    `accumulator_bits` is what the engine at hand was measured to add float16 products up in; only fp16 depends on it.
    """
    known = list(BOUNDS)  # from fine to coarse
    # 8da4w-g32 is 8da4w in smaller groups.
    names = [name.partition("-")[0] for name in graph.arithmetic]
    if accumulator_bits == 16:
        names = [SUMS_IN_16_BITS if name == "fp16" else name for name in names]
    for name in names:
        if name not in BOUNDS:
            raise BundleError(f"no parity bound is stated for {name!r}; there are bounds for {', '.join(BOUNDS)}")
    return BOUNDS[max(names, key=known.index)]


class NearTie(_Record, frozen=True):
    """A dropped token that the engine mixed into another kept token than the desktop did: image tokens from 0.

    `margin` is by how much more similar it is to the desktop's choice; less than `resolution`, so that this arithmetic
    cannot tell.
    """

    token: int
    desktop: int
    engine: int
    margin: float
    resolution: float


class TensorParity(_Record, frozen=True):
    """One output against the desktop's.

    max_abs   largest absolute difference
    rel       ||got - expected|| / ||expected||, Euclidean norms over all elements
    psnr_db   20 log10(max|expected| / rmse); None when nothing differs (rmse is 0)
    cosine    <got, expected> / (||got|| ||expected||)

    All four are None when `got` holds NaN or infinite values, which never passes. `near_ties` are decisions that went
    the other way than on the desktop: the kept tokens are then compared with what those decisions give.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float | None
    rel: float | None
    psnr_db: float | None
    cosine: float | None
    compared: str
    bound: str
    passed: bool
    note: str = ""
    near_ties: tuple[NearTie, ...] = ()


class Divergence(_Record, frozen=True):
    """The first choice of the desktop's selection that the engine did not make.

    `step` counts choices from 0; `margin` says how near the desktop's own choice was to going the other way.
    """

    step: int
    index: int
    margin: float | None


class KeptParity(_Record, frozen=True):
    """The kept tokens against the desktop's, as sets (`overlap`) and in order (`same_slots`, a share of the slots).

    `near_tie` is true where they are those of a choice that float32 cannot tell from the desktop's.
    """

    expected_count: int
    got_count: int
    overlap: float
    same_slots: float
    exact: bool
    ascending: bool
    missing: tuple[int, ...]
    extra: tuple[int, ...]
    first_divergence: Divergence | None
    bound: str
    passed: bool
    near_tie: bool = False


class TextParity(_Record, frozen=True):
    """Next tokens of the fixed text, predicted by the desktop and by the engine from the same cache.

    Perplexity is exp of the mean negative log-likelihood over `tokens` predictions, None beyond all numbers;
    `same_top1` is the share of them where both put the same token first.
    """

    tokens: int
    expected_perplexity: float | None
    got_perplexity: float | None
    same_top1: float


class AnswerParity(_Record, frozen=True):
    """The greedy answer to the sample question, end to end in the engine, against the desktop's, token by token."""

    expected_count: int
    same: int
    first_divergence: Divergence | None
    bound: str
    passed: bool


class GraphParity(_Record, frozen=True):
    """All outputs of one graph; `kept_indices` are the engine's own, for the picture in the report."""

    graph: str
    engine: str
    bound: Bound
    tensors: tuple[TensorParity, ...]
    kept: KeptParity | None = None
    kept_indices: tuple[int, ...] = ()
    text: TextParity | None = None

    @property
    def near_ties(self) -> tuple[NearTie, ...]:
        """Every decision of recovery that went the other way than on the desktop."""
        return tuple(tie for tensor in self.tensors for tie in tensor.near_ties)

    @property
    def passed(self) -> bool:
        return all(tensor.passed for tensor in self.tensors) and (self.kept is None or self.kept.passed)


def compare(name: str, expected: np.ndarray, got: np.ndarray, *, bound: Bound) -> TensorParity:
    """One tensor against its golden of the same shape, in float64; integers must be equal. See TensorParity."""
    if expected.shape != got.shape:
        raise BundleError(f"{name}: the golden has the shape {list(expected.shape)}, the graph {list(got.shape)}")
    return _judge(name, expected.shape, expected, got, bound=bound, compared="all")


def compare_kept(
    expected: np.ndarray,
    got: np.ndarray,
    *,
    least_overlap: float,
    order: np.ndarray | None = None,
    margin: np.ndarray | None = None,
    alternatives: np.ndarray | None = None,
) -> KeptParity:
    """Kept indices (keep,) against the golden's.

    `order` holds the golden's indices in the sequence of its choices, `margin` how near each was to going the other
    way, `alternatives` (A, keep) what the desktop keeps where choices too near for float32 go the other way: these
    pass, too. A result that is not strictly ascending never passes: it repeats a token or breaks the decoder's order.
    """
    wanted, found = expected.astype(np.int64).tolist(), got.astype(np.int64).tolist()
    wanted_set, found_set = set(wanted), set(found)
    overlap = len(wanted_set & found_set) / max(len(wanted_set), 1)
    ascending = all(a < b for a, b in pairwise(found))
    same = sum(a == b for a, b in zip(wanted, found, strict=False)) / max(len(wanted), len(found), 1)
    divergence = None
    if wanted_set != found_set:
        sequence = wanted if order is None else order.astype(np.int64).tolist()
        for step, index in enumerate(sequence):
            if index not in found_set:
                near = float(margin[step]) if margin is not None and np.isfinite(margin[step]) else None
                divergence = Divergence(step=step, index=index, margin=near)
                break
    exact = wanted == found
    near_tie = not exact and alternatives is not None and found in alternatives.tolist()
    enough = exact or near_tie if least_overlap >= 1 else overlap >= least_overlap
    return KeptParity(
        expected_count=len(wanted),
        got_count=len(found),
        overlap=overlap,
        same_slots=same,
        exact=exact,
        ascending=ascending,
        missing=tuple(sorted(wanted_set - found_set)),
        extra=tuple(sorted(found_set - wanted_set)),
        first_divergence=divergence,
        bound="exactly equal" if least_overlap >= 1 else f"overlap ≥ {least_overlap:g}",
        passed=enough and ascending and len(wanted) == len(found),
        near_tie=near_tie,
    )


def compare_answer(expected: np.ndarray, got: np.ndarray, *, margin: np.ndarray, exact: bool) -> AnswerParity:
    """Token ids (n,) of two answers; `margin` (n,) says by how much the desktop's logit led at each.

    Judged only where `exact` is asked for: after the first different token the two read different texts.
    Raises BundleError when the three have different lengths.
    """
    if not expected.shape == got.shape == margin.shape:
        raise BundleError(
            f"the golden contradicts itself: an answer of the shape {list(expected.shape)} has margins of the shape "
            f"{list(margin.shape)}, the engine gave {list(got.shape)}; export again"
        )
    same = expected == got
    divergence = None
    if not same.all():
        step = int(same.argmin())
        divergence = Divergence(step=step, index=int(expected[step]), margin=float(margin[step]))
    return AnswerParity(
        expected_count=len(expected),
        same=int(same.sum()),
        first_divergence=divergence,
        bound="every token equal" if exact else "reported only",
        passed=bool(same.all()) or not exact,
    )


def text_parity(ids: np.ndarray, expected: np.ndarray, got: np.ndarray) -> TextParity:
    """ids (T,), logits (1, T, V) of both sides behind each of them; the last one's prediction has no answer here.

    Raises BundleError when the ids are not those of the logits.
    """
    _, count, vocabulary = expected.shape
    if ids.shape != (count,) or not ((ids >= 0) & (ids < vocabulary)).all():
        raise BundleError(
            f"the golden contradicts itself: its text is not {count} ids below {vocabulary}, as its logits are; "
            "export again"
        )
    want, have = expected[0, :-1].astype(np.float64), got[0, :-1].astype(np.float64)

    def perplexity(logits: np.ndarray) -> float | None:
        with np.errstate(all="ignore"):
            top = logits.max(axis=1)
            total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            value = float(np.exp((total - logits[np.arange(len(logits)), ids[1:]]).mean()))
        return value if math.isfinite(value) else None

    return TextParity(
        tokens=len(want),
        expected_perplexity=perplexity(want),
        got_perplexity=perplexity(have),
        same_top1=float((want.argmax(axis=1) == have.argmax(axis=1)).mean()),
    )


# Outputs with one row per kept token (axis 1), and the output that says which token each row is.
_TOKEN_IDS = {"hidden": "positions", "image_features": "kept_indices"}


def graph_parity(
    manifest: Manifest,
    graph: GraphInfo,
    golden: dict[str, np.ndarray],
    got: dict[str, np.ndarray],
    *,
    engine: str,
    step: str = "",
    accumulator_bits: int = 32,
) -> GraphParity:
    """All outputs of a graph, at a step if it has several, against the golden's `<step>.out.<output>`.

    Kept tokens are judged first. Their rows are then compared one by one, with what the desktop's features give for the
    engine's own choice of tokens and, where near ties fell the other way, for its own decisions; see `_compare_rows`.
    Raises BundleError when the golden lacks an output, or contradicts itself.
    """
    step = step or graph.name
    bound = bound_for(graph, accumulator_bits=accumulator_bits)
    expected = {info.name: graph_output(info, golden, step) for info in graph.outputs}
    ids_name = next((name for name in ("positions", "kept_indices") if name in got), None)
    prefix = manifest.frame.before if ids_name == "positions" else 0
    read = golden.get(input_key(TOKEN_EMBEDDING, "ids")) if step == TEXT_PREFILL and "logits" in got else None
    kept = None
    kept_indices: np.ndarray | None = None
    if ids_name is not None:
        kept_indices, wanted = (
            _image_indices(manifest, _ids(side[ids_name])[prefix:] - prefix) for side in (got, expected)
        )
        if KEPT_INDICES in golden and not np.array_equal(wanted, golden[KEPT_INDICES].reshape(-1)):
            raise BundleError(f"the golden contradicts itself: {ids_name} is not kept_indices; export again")
        kept = compare_kept(
            wanted,
            kept_indices,
            least_overlap=bound.least_overlap,
            order=golden.get(KEPT_ORDER),
            margin=golden.get(KEPT_MARGIN),
            alternatives=golden.get(KEPT_ALTERNATIVES),
        )
    tensors = []
    for info in graph.outputs:
        name, want, have = info.name, expected[info.name], got[info.name]
        if kept_indices is not None and manifest.prune.pruned and _TOKEN_IDS.get(name) == ids_name:
            recovery = Recovery.from_golden(golden, tokens=manifest.prune.image_tokens, width=want.shape[2])
            ids = _image_indices(manifest, _ids(expected[_TOKEN_IDS[name]])[prefix:] - prefix), kept_indices
            tokens = manifest.prune.image_tokens
            tensors.append(_compare_rows(name, want, have, ids=ids, tokens=tokens, recovery=recovery, bound=bound))
        elif kept is not None and name == ids_name and not kept.exact:
            tensors.append(_compare_ids(name, want, have, prefix=prefix, kept=kept))
        else:
            tensors.append(compare(name, want, have, bound=bound))
    return GraphParity(
        graph=step_label(graph.name, step),
        engine=engine,
        bound=bound,
        tensors=tuple(tensors),
        kept=kept,
        kept_indices=() if kept_indices is None else tuple(kept_indices.tolist()),
        text=None if read is None else text_parity(read.reshape(-1), expected["logits"], got["logits"]),
    )


def _image_indices(manifest: Manifest, numbers: np.ndarray) -> np.ndarray:
    """Image tokens by their numbers (T,) in the unpruned image; row ends, which are none, are -1, or left out there."""
    indices = manifest.frame.image_indices(numbers + manifest.frame.before)
    return indices if manifest.prune.pruned else indices[indices >= 0]


def _ids(array: np.ndarray) -> np.ndarray:
    """Token ids as a flat int64 array. Delegates without integers give whole numbers as float32; NaN becomes -1."""
    flat = array.reshape(-1)
    if np.issubdtype(flat.dtype, np.integer):
        return flat.astype(np.int64)
    whole: np.ndarray = np.rint(np.where(np.isfinite(flat), flat, -1))
    return whole.astype(np.int64)


def _compare_ids(name: str, want: np.ndarray, have: np.ndarray, *, prefix: int, kept: KeptParity) -> TensorParity:
    """An output of token ids whose kept part differs: the prefix must be equal, the rest is judged as kept tokens."""
    same_prefix = np.array_equal(want.reshape(-1)[:prefix], have.reshape(-1)[:prefix])
    return TensorParity(
        name=name,
        shape=want.shape,
        max_abs=None,
        rel=None,
        psnr_db=None,
        cosine=None,
        compared="as kept tokens",
        bound=kept.bound,
        passed=same_prefix and kept.passed,
        note="" if same_prefix else f"the {prefix} positions of the prompt differ",
    )


def _compare_rows(
    name: str,
    want: np.ndarray,
    have: np.ndarray,
    *,
    ids: tuple[np.ndarray, np.ndarray],
    tokens: int,
    recovery: Recovery | None,
    bound: Bound,
) -> TensorParity:
    """An output (1, P + keep, D) of the prompt's rows and the kept tokens', of `tokens` in the image: every row counts.

    `ids` (keep,) are the golden's tokens and the engine's. Where these differ, each of the engine's is compared with
    what the desktop's features give it for that choice. A row outside the bound is compared with what it holds when
    tokens went the other way whose two candidates are too near for this arithmetic; it must then lie within. Without
    recovery the golden holds the rows of its own choice alone, and any other fails.
    """
    expected_ids, kept = ids
    prefix = want.shape[1] - len(kept)
    if not (np.diff(kept) > 0).all() or kept[0] < 0 or kept[-1] >= tokens:
        return _failed(name, want.shape, bound, "nothing", "the kept tokens are not ascending tokens of the image")
    got = have[0, prefix:].astype(np.float64)
    if not np.isfinite(got).all():
        return _judge(name, want.shape, want, have, bound=bound, compared="all")
    rows, same = want[0, prefix:].astype(np.float64), np.array_equal(*ids)
    otherwise = len(np.setdiff1d(kept, expected_ids))
    compared = "all" if same else f"all, {otherwise} of {len(kept)} tokens chosen otherwise"
    if recovery is None:
        if not same:
            note = f"{otherwise} of {len(kept)} tokens chosen otherwise, and the golden holds no rows of them"
            return _failed(name, want.shape, bound, "nothing", note)
    else:
        own = recovery.rows(expected_ids, recovery.standing(expected_ids).slot)
        if (_rel(rows, rows - own) > _MOST_REL_OF_GOLDEN).any():
            raise BundleError(f"the golden contradicts itself: {name} is not what recovery.hidden gives; export again")
        if not same:
            rows = recovery.rows(kept, recovery.standing(kept).slot)
    outside = _outside(rows, got, bound)
    moved: tuple[Moved, ...] = ()
    if recovery is not None and outside.any():
        rows, moved = recovery.decided_as(kept, got, outside, resolution=bound.resolution)
        outside = _outside(rows, got, bound)
    if moved:
        compared += f", {len(moved)} near tie{'s' if len(moved) > 1 else ''} decided otherwise"
    judged = _judge(
        name, want.shape, np.concatenate([want[0, :prefix], rows])[None], have, bound=bound, compared=compared
    )
    ties = tuple(NearTie(**one._asdict(), resolution=bound.resolution) for one in moved)
    if not outside.any():
        return msgspec.structs.replace(judged, near_ties=ties)
    note = f"{outside.sum()} of {len(kept)} kept tokens outside the bound, image token {kept[outside.argmax()]} first"
    return msgspec.structs.replace(judged, near_ties=ties, passed=False, note=note)


def _outside(want: np.ndarray, have: np.ndarray, bound: Bound) -> np.ndarray:
    """True for each row (rows, n) beyond a bound."""
    beyond = np.zeros(len(want), bool)
    if bound.most_rel is not None:
        beyond |= _rel(want, have - want) > bound.most_rel
    if bound.least_cosine is not None:
        beyond |= _cosine(want, have) < bound.least_cosine
    return beyond


def _judge(
    name: str,
    shape: tuple[int, ...],
    expected: np.ndarray,
    got: np.ndarray,
    *,
    bound: Bound,
    compared: str,
) -> TensorParity:
    integer = np.issubdtype(expected.dtype, np.integer) or expected.dtype == np.bool_
    want, have = expected.astype(np.float64), got.astype(np.float64)
    broken = int(np.count_nonzero(~np.isfinite(have)))
    if broken or not np.isfinite(want).all():
        which = f"{broken} values of the graph" if broken else "values of the golden"
        return _failed(name, shape, bound, compared, f"{which} are NaN or infinite")
    difference = have - want
    rel = float(_rel(want.reshape(1, -1), difference.reshape(1, -1))[0])
    cosine = float(_cosine(want.reshape(1, -1), have.reshape(1, -1))[0])
    max_abs = float(np.abs(difference).max(initial=0.0))
    if integer:
        passed, stated = max_abs == 0, "equal"
    else:
        passed = (bound.most_rel is None or rel <= bound.most_rel) and (
            bound.least_cosine is None or cosine >= bound.least_cosine
        )
        stated = _stated(bound)
    return TensorParity(
        name=name,
        shape=shape,
        max_abs=max_abs,
        rel=rel,
        psnr_db=_psnr_db(want, difference),
        cosine=cosine,
        compared=compared,
        bound=stated,
        passed=passed,
    )


def _failed(name: str, shape: tuple[int, ...], bound: Bound, compared: str, note: str) -> TensorParity:
    return TensorParity(
        name=name,
        shape=shape,
        max_abs=None,
        rel=None,
        psnr_db=None,
        cosine=None,
        compared=compared,
        bound=_stated(bound),
        passed=False,
        note=note,
    )


def _stated(bound: Bound) -> str:
    limits = []
    if bound.most_rel is not None:
        limits.append(f"rel ≤ {bound.most_rel:g}")
    if bound.least_cosine is not None:
        limits.append(f"cosine ≥ {bound.least_cosine:g}")
    return ", ".join(limits)


def _rel(want: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """(rows, n) -> (rows,): relative Euclidean error of each row."""
    scale = np.maximum(np.linalg.norm(want, axis=1), _TINY)
    return np.asarray(np.linalg.norm(difference, axis=1) / scale)


def _cosine(want: np.ndarray, have: np.ndarray) -> np.ndarray:
    """(rows, n) -> (rows,): cosine of each pair of rows; 1 when both are zero, 0 when one is."""
    norms = np.linalg.norm(want, axis=1), np.linalg.norm(have, axis=1)
    both_zero = (norms[0] < _TINY) & (norms[1] < _TINY)
    product = np.maximum(norms[0] * norms[1], _TINY**2)
    return np.where(both_zero, 1.0, (want * have).sum(axis=1) / product)


def _psnr_db(want: np.ndarray, difference: np.ndarray) -> float | None:
    """20 log10(max|expected| / rmse); None when rmse is 0."""
    if not difference.size:
        return None
    rmse = math.sqrt(float(np.mean(np.square(difference))))
    peak = float(np.abs(want).max())
    return None if rmse == 0 else 20 * math.log10(max(peak, _TINY) / rmse)
