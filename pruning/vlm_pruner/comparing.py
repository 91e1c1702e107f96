"""VLM-Pruner with static shapes for engines that compute in float16 and can compare, such as phones' NPUs.

The other static form tells numbers apart by multiplying their differences with 2^60, which float16 cannot hold. Here
comparisons, selects and the smallest of a row do that work. Every count and place is a whole number that float16 holds:
places in an order are counted from the middle, which doubles how far that goes.

Float16 has 11 bits, and the choices turn on the 17th. The numbers that decide are therefore pairs: the nearest float16
and what it leaves. Engines add up the terms of a product in float32 and round the total, so a second product that holds
the same terms and the first total, negative, gives the rest. What differences of two numbers leave, float16 can compute
itself. What only has to be brought into range is multiplied by powers of two, which rounds nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning.method import Features, check_features, check_shapes
from pruning.recovery import CANCELLATION
from pruning.spec import PruneSpec, SpecError
from pruning.vlm_pruner.reference import squared_distances
from pruning.vlm_pruner.settings import RANK_EVERY, Settings

BEYOND = 16384.0  # above every place and score, and far from float16's largest number
MOST_TOKENS = 4096  # places counted from the middle are whole numbers that float16 holds up to here
WHOLE = 2048  # float16 holds every whole number up to here
DIGIT = 64  # positions beyond WHOLE leave the graph as two whole numbers, of which one counts these
LEAST = 2.0**-13  # smaller divisors are no longer precise in float16
UNIT = 1024.0  # distances and scores are kept times this, so that their rests stay above float16's smallest numbers
FINE = 256.0  # rests of distances between keys are kept times this for the same reason
GRAIN = 4096.0  # rests are whole multiples of 1 / GRAIN: what differs by less is float32's noise, and ties
MOST_COUNTED = 2047  # levels and channels are counted up to here
MOST_NAMED = 14336  # numbers that float16 holds from 1 up to BEYOND
SMALLEST, LARGEST = -13, 14  # as powers of two, between which sizes are brought near 1
BIASED = 4.0  # deviations from zero, from which on a channel's mean is taken out before squares are added up
LARGEST_KEY = 2.0**12  # what keys are brought to, so that small ones beside it lose nothing and no difference overflows
LONGEST = 64.0  # what the longest distance from the first pivot is brought to: no other squared exceeds BEYOND


class _Pair(NamedTuple):
    """Numbers as the nearest ones that the dtype holds, and what these leave.

    The rest is at most half of the last place, so of two numbers the one with the larger `near` is larger, and where
    these are equal the one with the larger `rest`. In float32 it is nothing but noise, and rounded away.
    """

    near: Tensor
    rest: Tensor

    def exceeds(self, other: _Pair) -> Tensor:
        """True where larger than the other, with broadcasting."""
        return (self.near > other.near) | ((self.near == other.near) & (self.rest > other.rest))

    def least(self, dim: int) -> _Pair:
        """The smallest along an axis, which stays with length 1."""
        near = self.near.amin(dim, keepdim=True)
        return _Pair(near, torch.where(self.near <= near, self.rest, BEYOND).amin(dim, keepdim=True))

    def beside(self, other: _Pair, dim: int) -> _Pair:
        """Both along an axis."""
        return _Pair(torch.cat([self.near, other.near], dim), torch.cat([self.rest, other.rest], dim))

    def grained(self) -> _Pair:
        """The rests rounded to multiples of 1 / GRAIN."""
        return _Pair(self.near, torch.floor(self.rest * GRAIN + 0.5) * (1.0 / GRAIN))

    def times(self, mask: Tensor) -> _Pair:
        """The numbers where the mask is 1 and 0 where it is 0."""
        return _Pair(self.near * mask, self.rest * mask)

    def plus(self, other: _Pair) -> _Pair:
        """The sum of numbers of which one is 0."""
        return _Pair(self.near + other.near, self.rest + other.rest)

    def transposed(self) -> _Pair:
        """Both with the last two axes exchanged."""
        return _Pair(self.near.transpose(1, 2), self.rest.transpose(1, 2))

    def reshape(self, *shape: int) -> _Pair:
        """Both in another shape."""
        return _Pair(self.near.reshape(shape), self.rest.reshape(shape))


class ComparingPruner(nn.Module):
    """Keep `spec.keep` of N image tokens: `TokenPruner`'s interface and choices, in the dtype of the features.

    In float32 it differs from `reference.prune` only where two numbers tie to the last bits, because it adds up in
    another order. In float16, with products that add up in float32, similarities are right to 3e-6 or so, distances
    between keys to a millionth of themselves, and closer choices fall either way. That holds for keys of any scale,
    whatever all of them have in common, as far as float16 holds the keys themselves: of normally distributed ones it
    leaves 6 bits behind an offset of 30 and none behind one of 2000.

    A matrix of N x N float16 takes 33 MB at 4096 tokens. The compiled graph holds four as constants, and by count about
    15 are alive at once. Positions are int32 in an exported program beyond 2048 tokens, because float16 does not hold
    them. A compiler for an NPU took the whole graph up to 1024 tokens; with more it was not seen to finish.

    Source: arXiv 2512.02700; the static form is our own.

    Raises:
        SpecError: more than MOST_TOKENS tokens, more than MOST_COUNTED channels or levels, more than MOST_NAMED hidden
            channels, shapes that do not fit, or (outside an exported program) features that are not finite.
    """

    counts: Tensor
    places: Tensor
    names: Tensor
    earlier: Tensor
    same: Tensor
    powers: Tensor
    per_token: Tensor
    buffering: Tensor
    thresholds: Tensor
    ends: Tensor
    first_ones: Tensor
    digits: Tensor

    def __init__(self, spec: PruneSpec) -> None:
        super().__init__()
        settings = Settings.of(spec)
        if spec.tokens > MOST_TOKENS:
            raise SpecError(f"{spec.views} has {spec.tokens} tokens; the float16 form can place {MOST_TOKENS} at most")
        for what, count in (("channels", settings.channels), ("threshold levels", len(settings.levels()))):
            if count > MOST_COUNTED:
                raise SpecError(f"{count} {what} are too many; the float16 form can count {MOST_COUNTED} at most")
        self.spec, self.settings = spec, settings
        self.steps = self.settings.static_steps(spec.keep)
        self.turns = _names(self.steps + 1).tolist()[::-1]  # of the pivots and of each step, the earlier the larger
        # Places in an order are counted from the middle, so that they stay within -WHOLE .. WHOLE.
        self.middle = spec.tokens // 2
        at = torch.arange(spec.tokens)
        size = min(settings.token_batch, spec.tokens)
        # What precedes a token is counted in one sum, to which the token itself adds where counting starts.
        earlier = (at[None, :] < at[:, None]).float() - torch.eye(spec.tokens) * float(self.middle)
        digits = [at] if spec.tokens <= WHOLE else [at // DIGIT * DIGIT, at % DIGIT]
        constants = {
            "counts": torch.arange(max(settings.channels + 1, len(settings.levels()))).float()[None, None],
            "places": (at - self.middle).float()[None, None],
            "names": _names(MOST_NAMED)[None, None],
            "earlier": earlier[None],  # [i, j] is 1 where j comes before i
            "same": torch.eye(spec.tokens)[None],
            "powers": 2.0 ** torch.arange(SMALLEST, LARGEST).float()[None, None],
            "per_token": _parts(torch.full((1, 1), spec.tokens**-0.5, dtype=torch.float64)) * torch.tensor([1.0, UNIT]),
            "buffering": _parts(squared_distances(spec).sqrt() * settings.distance_slope(spec.extent) * UNIT),
            "thresholds": _parts((1.0 - torch.tensor(settings.levels(), dtype=torch.float64)[None]) * UNIT),
            "ends": (torch.arange(size, spec.tokens + size, size).clamp(max=spec.tokens) - self.middle)[None, None],
            "first_ones": (at < spec.keep).float()[None, None],
            "digits": torch.stack(digits)[None, :, None],
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    def forward(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        tokens, indices, _ = self.select(keys, hidden)
        return tokens, indices

    def select(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like `forward`, and (B, 1): how many tokens the fill rule had to choose because the steps ran out."""
        exporting = torch.compiler.is_exporting()
        (check_shapes if exporting else check_features)(Features(hidden=hidden, keys=keys), self.spec)
        if hidden.shape[2] > MOST_NAMED:
            raise SpecError(
                f"hidden is {hidden.shape[2]} wide; the float16 form tells {MOST_NAMED} channels apart at most"
            )
        apart = self._apart(hidden)
        chosen, filled = self._expand(apart, self._pivots(keys))
        pick = self._pick(chosen)
        tokens = torch.bmm(self._recovery(apart, chosen, pick), hidden)
        indices = self._positions(pick)
        return tokens, indices if exporting else indices.long(), filled.view(-1, 1)

    def _pivots(self, keys: Tensor) -> Tensor:
        """1 where a token is a pivot: (B, N, Dk) -> (B, 1, N)."""
        width = keys.shape[2]
        keys = keys * (self._scale(keys.abs().amax((1, 2), keepdim=True))[1].clamp(max=8.0) * LARGEST_KEY)
        # Lengths are compared with the first token's, so that what all keys have in common takes no bits.
        size = keys.abs()
        longer = _difference(size, size[:, :1])
        each = torch.cat(longer, 2)
        share = each * 0.0 + 0.5 ** math.ceil(math.log2(width))
        norm = self._dots(each, share, fine=FINE).transposed()
        newest = self._first_largest(norm)
        selected, nearest, bring = newest, None, None
        for number in range(1, self.settings.first_pivots(self.spec.keep)):
            away = _difference(keys, torch.bmm(newest, keys))
            if bring is None:
                bring = self._scale(away.near.abs().amax((1, 2), keepdim=True))[1].clamp(max=32.0)
                near = away.near * bring
                length = (near * near).sum(2, keepdim=True).amax(1, keepdim=True).sqrt()
                bring = bring * self._scale(length * (1.0 / LONGEST))[1].clamp(max=512.0)
            near, rest = away.near * bring, away.rest * (bring * 2.0)
            distance = self._dots(torch.cat([near, near], 2), torch.cat([near, rest], 2), fine=FINE).transposed()
            nearest = distance if nearest is None else nearest.beside(distance, 1).least(1)
            score = norm if number < self.settings.norm_pivots else nearest
            # Selected tokens are out of reach, so that identical keys still give distinct pivots.
            newest = self._first_largest(_Pair(score.near - selected * (2.0 * BEYOND), score.rest))
            selected = selected + newest
        return selected

    def _apart(self, hidden: Tensor) -> _Pair:
        """1 - cosine similarity on the channels of largest variance, in units: (B, N, D) -> (B, N, N)."""
        if hidden.shape[2] > self.settings.channels:
            hidden = torch.bmm(hidden, self._strongest(hidden))
        row = hidden * self._scale(hidden.abs().amax(2, keepdim=True))[1]
        row = row * self._scale((row * row).sum(2, keepdim=True).sqrt())[1]
        unit = self._unit(row)
        one = unit.near[:, :, :1] * 0.0 + 1.0
        left = torch.cat([-unit.near, -unit.near, -unit.rest, one], 2)
        right = torch.cat([unit.near, unit.rest, unit.near, one * UNIT], 2)
        return _product(left, right.transpose(1, 2), self.same.expand(len(hidden), -1, -1)).grained()

    def _unit(self, row: Tensor) -> _Pair:
        """Rows of lengths between 1/2 and 1 brought to that of which the square is UNIT: (B, N, D) -> (B, N, D)."""
        batch, count, width = row.shape
        square = self._dots(row * UNIT, row)
        shorten = torch.cat(self._one_over_root(square), 2).reshape(batch * count, 1, 2)
        rows = torch.stack([row * UNIT**0.5, row * UNIT**-0.5], 2).reshape(batch * count, 2, width)
        return _product(shorten, rows, self._ones(batch * count)).reshape(batch, count, width)

    def _one_over_root(self, square: _Pair) -> _Pair:
        """1 over the root of numbers in units, with the rest in 1 / UNIT: (B, N, 1) -> (B, N, 1)."""
        first = 1.0 / (square.near * (1.0 / UNIT)).clamp(min=LEAST).sqrt()
        times_first = self._dots(torch.cat(square, 2), torch.cat([first, first], 2))
        unit = first * 0.0 + UNIT
        # 1 - square / root^2
        missing = self._dots(torch.cat([unit, *times_first], 2), torch.cat([unit * (1.0 / UNIT), -first, -first], 2))
        return _Pair(first, first * (missing.near * 0.5))

    def _strongest(self, hidden: Tensor) -> Tensor:
        """One-hot columns that pick the channels of largest variance: (B, N, D) -> (B, D, channels)."""
        count, wanted = hidden.shape[1], self.settings.channels
        mean = hidden.mean(1, keepdim=True)
        centred = hidden - mean
        reach = centred.abs().amax(1, keepdim=True)
        share = centred / reach.clamp(min=LEAST)
        deviation = reach * (share * share).mean(1, keepdim=True).sqrt()  # without squares beyond float16
        biased = (mean.abs() > deviation * BIASED).to(hidden.dtype)
        scale, inverse = self._scale(deviation.transpose(1, 2))
        scaled = (hidden - mean * biased) * inverse.transpose(1, 2)
        # The sum of squares less the square of the sum, in one product. `per_token` is 1 / sqrt(N).
        weights = self.per_token.expand(len(hidden), count, 2).transpose(1, 2).reshape(len(hidden), 1, 2 * count)
        both = torch.cat([scaled, scaled * (1.0 / UNIT)], 1)
        total = _product(weights, both, self._ones(len(hidden))).transposed()
        scaled, one = scaled.transpose(1, 2), scale * 0.0 + 1.0
        half = float(count // (2 * DIGIT) * DIGIT)  # in two parts that float16 holds
        left = torch.cat([scaled, total.near, total.near, one, one], 2)
        right = torch.cat([scaled, -total.near, total.rest * -2.0, one * half, one * (0.5 * count - half)], 2)
        variance = self._dots(left, right).grained().transposed()
        # Grows with the variance, across the scales too.
        order = variance.near * 0.5 ** math.ceil(math.log2(count)) * scale.transpose(1, 2)
        lowest = order.topk(wanted, dim=2).values[:, :, -1:]
        certain, tied = order > lowest, order == lowest
        room = float(wanted) - certain.to(order.dtype).sum(2, keepdim=True)
        rests = torch.where(tied, variance.rest, -BEYOND)
        last = (self.counts[:, :, 1 : wanted + 1] == room).to(order.dtype)
        enough = (rests.topk(wanted, dim=2).values * last).sum(2, keepdim=True)
        # The best channels have numbers above 0; of those that tie in both the first has the largest below.
        names = self.names[:, :, : hidden.shape[2]]
        names = torch.where(certain | (rests > enough), names, torch.where(rests == enough, -names, -BEYOND))
        return (names.transpose(1, 2) == names.topk(wanted, dim=2).values).to(hidden.dtype)

    def _expand(self, apart: _Pair, pivots: Tensor) -> tuple[Tensor, Tensor]:
        """Centrifugal expansion: (B, 1, N) with 1 for the `keep` tokens that stay, and how many of them filled up.

        A step accepts from the first batch of the running pass that has something to accept. Tokens are scored by one
        minus their adjusted similarity.
        """
        dtype = pivots.dtype
        nothing = pivots[:, :, :1] * 0.0
        one = nothing + 1.0
        buffering = _settled(*(part * one for part in self.buffering.unbind(-1)))
        both = apart.beside(buffering, 1)
        thresholds = _settled(*(part * one for part in self.thresholds.unbind(-1)))
        levels = self.counts[:, :, : self.thresholds.shape[1]]
        nearest = self._nearest(both, pivots)
        selected = pivots
        when = pivots * -self.turns[0]  # pivots come first, tokens that no step reaches last
        scored = _Pair(pivots * 0.0, pivots * 0.0)
        limit = _Pair(nothing, nothing)
        level = rank = behind = nothing  # a pass: its number, places, and how many are done
        for number in range(self.steps):
            score = self._score(nearest)
            left = _Pair(score.near - selected * BEYOND, score.rest)
            if number % RANK_EVERY == 0:
                # A new pass if the running one has nothing left to accept; levels that accept nothing are skipped.
                best = _Pair(-left.near, -left.rest).least(2)
                useful = _Pair(-thresholds.near, -thresholds.rest).exceeds(best).to(dtype)
                useless = (1.0 - useful).sum(2, keepdim=True)
                if number:
                    going_on = (left.exceeds(limit) & (rank >= behind)).to(dtype).amax(2, keepdim=True)
                    going_on = going_on > 0.25  # not 0, a constant that quantised operators have, and would share
                    level = torch.where(going_on, level, torch.maximum(useless, level + 1.0))
                    rank = torch.where(going_on, rank, self._rank(left))
                    behind = torch.where(going_on, behind, -BEYOND)
                else:
                    level, rank, behind = useless, self._rank(left), nothing - BEYOND
                at_level = thresholds.times((levels == level).to(dtype))
                limit = _Pair(at_level.near.sum(2, keepdim=True), at_level.rest.sum(2, keepdim=True))
            accept = left.exceeds(limit) & (rank >= behind)
            first = torch.where(accept, rank, BEYOND).amin(2, keepdim=True)
            behind = torch.where(self.ends > first, self.ends, BEYOND).amin(2, keepdim=True)
            taken = (accept & (rank < behind)).to(dtype)
            when = when - taken * self.turns[number + 1]
            scored = scored.plus(score.times(taken))
            selected = selected + taken
            nearest = nearest.beside(self._nearest(both, taken), 2).least(2)
        scored = scored.plus(self._score(nearest).times(1.0 - selected))
        filled = torch.relu((self.first_ones - selected).sum(2))
        place = self._rank(scored, before=when)
        return (place < float(self.spec.keep - self.middle)).to(dtype), filled

    @staticmethod
    def _nearest(both: _Pair, tokens: Tensor) -> _Pair:
        """How near each token is to the nearest of some, in features and on the grid: (B, 2N, N) -> (B, 2N, 1)."""
        return _Pair(both.near + (1.0 - tokens) * BEYOND, both.rest).least(2)

    def _score(self, nearest: _Pair) -> _Pair:
        """One minus the similarity times the buffer, in units: (B, 2N, 1) -> (B, 1, N).

        With the distance `a` and the buffer's excess `b`, both times UNIT, that is a b / UNIT - b + a. Sums begin with
        the first terms: where `a` is UNIT, as between tokens that have nothing in common, these two leave nothing.
        """
        count, share = self.spec.tokens, 1.0 / UNIT
        (a, b), (a_rest, b_rest) = ((part[:, :count], part[:, count:]) for part in nearest)
        one, half = a * 0.0 + 1.0, UNIT**-0.5
        left = torch.cat([a * half, b, a, a * share, b_rest, a_rest, a_rest], 2)
        right = torch.cat([b * half, -one, one, b_rest, -one, one, b * share], 2)
        return self._dots(left, right).grained().transposed()

    def _rank(self, score: _Pair, *, before: Tensor | None = None) -> Tensor:
        """Place of each token, counted from the middle: the largest score first, or the smallest `before`.

        All are (B, 1, N).
        """
        own = _Pair(score.near.transpose(1, 2), score.rest.transpose(1, 2))
        ahead = torch.where(score.rest == own.rest, self.earlier, (score.rest > own.rest).to(score.near.dtype))
        ahead = torch.where(score.near == own.near, ahead, (score.near > own.near).to(ahead.dtype))
        if before is not None:
            since = before.transpose(1, 2)
            ahead = torch.where(before == since, ahead, (before < since).to(ahead.dtype))
        return ahead.sum(2)[:, None]

    def _pick(self, chosen: Tensor) -> Tensor:
        """One-hot rows of the kept tokens in ascending position: (B, 1, N) -> (B, keep, N)."""
        place = (self.earlier * chosen).sum(2)[:, None]
        return (place == self._slots()).to(chosen.dtype) * chosen

    def _positions(self, pick: Tensor) -> Tensor:
        """What one-hot rows pick, as whole numbers: (B, keep, N) -> (B, keep)."""
        digits = [(pick * digit).sum(2) for digit in self.digits.unbind(1)]
        return digits[0] if len(digits) == 1 else digits[0].to(torch.int32) + digits[1].to(torch.int32)

    def _recovery(self, apart: _Pair, chosen: Tensor, pick: Tensor) -> Tensor:
        """The matrix that picks the kept tokens and mixes the dropped ones into them: (B, keep, N)."""
        if not self.settings.recovery:
            return pick
        to_kept = _Pair(torch.bmm(pick, apart.near), torch.bmm(pick, apart.rest))
        slot = torch.where(to_kept.exceeds(to_kept.least(1)), BEYOND, self._slots()).amin(1, keepdim=True)
        similarity = ((UNIT - to_kept.near) - to_kept.rest) * (1.0 / UNIT)
        weight = (self._slots() == slot).to(pick.dtype) * similarity * (1.0 - chosen)
        total = weight.sum(2, keepdim=True)
        mixed = (total > weight.abs().sum(2, keepdim=True) * CANCELLATION).to(pick.dtype) * self.settings.recovery
        return pick * (1.0 - mixed) + weight * (mixed / total.clamp(min=LEAST))

    def _slots(self) -> Tensor:
        """The places of the kept tokens among themselves: (1, keep, 1)."""
        return self.places[:, :, : self.spec.keep].transpose(1, 2)

    def _first_largest(self, score: _Pair) -> Tensor:
        """One-hot of the first largest element of a row: (B, 1, N) -> (B, 1, N)."""
        rest = torch.where(score.near >= score.near.amax(2, keepdim=True), score.rest, -BEYOND)
        first = torch.where(rest >= rest.amax(2, keepdim=True), self.places, BEYOND).amin(2, keepdim=True)
        return (self.places == first).to(rest.dtype)

    def _dots(self, left: Tensor, right: Tensor, *, fine: float = 1.0) -> _Pair:
        """Rows times rows, with the rest times `fine`: twice (B, M, K) -> (B, M, 1)."""
        batch, count, width = left.shape
        left, right = left.reshape(-1, 1, width), right.reshape(-1, width, 1)
        return _product(left, right, self._ones(batch * count), fine=fine).reshape(batch, count, 1)

    def _ones(self, count: int) -> Tensor:
        """The identity of products with one row: (count, 1, 1)."""
        return self.same[:, :1, :1].expand(count, -1, -1)

    def _scale(self, size: Tensor) -> tuple[Tensor, Tensor]:
        """The power of two above each size, and its inverse, which brings it into 1/2 .. 1: (B, M, 1) twice."""
        large = size >= self.powers
        above = torch.where(large, self.powers * 2.0, 2.0**SMALLEST).amax(2, keepdim=True)
        return above, torch.where(large, 0.5 / self.powers, 2.0**-SMALLEST).amin(2, keepdim=True)


def _parts(values: Tensor) -> Tensor:
    """The nearest float16 of each number and what it leaves: (...) -> (..., 2)."""
    near = values.half().double()
    return torch.stack([near, values.double() - near], -1)


def _names(count: int) -> Tensor:
    """Numbers that float16 tells apart, ascending from 1: (count,)."""
    return torch.arange(0x3C00, 0x3C00 + count, dtype=torch.int16).view(torch.float16).float()


def _difference(rows: Tensor, row: Tensor) -> _Pair:
    """Each row less one, exactly: (B, N, D) and (B, 1, D) -> (B, N, D).

    Source: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    near = rows - row
    back = near - rows
    return _Pair(near, (rows - (near - back)) - (row + back))


def _settled(near: Tensor, rest: Tensor) -> _Pair:
    """The pair of a sum."""
    total = near + rest
    return _Pair(total, (near - total) + rest).grained()


def _product(left: Tensor, right: Tensor, identity: Tensor, *, fine: float = 1.0) -> _Pair:
    """Matrix product with the rests times `fine`: (B, M, K), (B, K, N) and the identity (B, M, M) -> (B, M, N)."""
    near = torch.bmm(left, right)
    if fine != 1.0:
        right, identity = right * fine, identity * fine
    return _Pair(near, torch.bmm(torch.cat([left, identity], 2), torch.cat([right, -near], 1)))
