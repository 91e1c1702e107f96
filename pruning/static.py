"""VLM-Pruner with static shapes and a fixed number of steps, written in the few operators that mobile delegates keep whole.

Only bmm, softmax, max_pool2d, minimum, add, sub, mul, div, abs, neg, sqrt, clamp, cat, slice, view and permute appear: no
comparison, gather, scatter, sort or reduction, which the delegates refuse or split the graph at. A comparison of two
numbers is `clamp(difference * HUGE, 0, 1)`, which is exactly 0 or 1; a gather is a product with a one-hot matrix; the place
in an order is a count of smaller ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.reference import CANCELLATION, check_features, check_shapes
from pruning.spec import PruneSpec, SpecError

HUGE = 2.0**60  # turns any difference of two unequal float32 numbers above 1e-10 into at least 1
GRAIN = 2.0**24  # scores 1 - adj of competing tokens are whole multiples of 2^-24 in float32
APART = 128.0  # softmax of inputs this far apart is exactly one-hot in float32 (exp(-104) is already 0)
TAKEN = 16.0  # beyond any adjusted similarity, threshold or score
WIDEST = 128 * 128  # the most tokens or channels that the constants cover
RANK_EVERY = 4  # steps between two chances to begin a new pass: ranking costs more than a step


@dataclass(frozen=True)
class _State:
    """What a step changes; rows are (B, 1, N), scalars (B, 1, 1)."""

    nearness: Tensor  # (B, 1, 2N): minus the largest similarity to the selected | the smallest squared grid distance
    selected: Tensor  # 1 for selected tokens
    step: Tensor  # the step that selected the token, `last` for the others
    score: Tensor  # 1 - adj of the moment of selection, 0 for the others
    rank: Tensor  # place in the order that the running pass froze at its start
    passed: Tensor  # 1 for tokens that the running pass must not look at any more
    level: Tensor  # number of the running pass


class TokenPruner(nn.Module):
    """Keep `spec.keep` of N image tokens: (keys (B, N, Dk), hidden (B, N, D)) -> (tokens (B, keep, D), indices (B, keep)).

    `keys` are those of the layer before the cut, after rotary embedding, all heads side by side; `hidden` is what enters
    the cut. Tokens come out in ascending position with the dtype of `hidden`; arithmetic is float32 throughout. Indices
    are int64; in an exported program they are float32 whole numbers, because mobile delegates have no int64 and a cast
    would be the one operator that they leave outside. The result equals `reference.prune`: each step that is not idle
    selects at least one token and a pass idles at most RANK_EVERY - 1 steps, so the fixed number of steps always reaches
    `keep`, whatever the features.

    Source: arXiv 2512.02700; the static form is our own.

    Raises:
        SpecError: shapes that do not fit, or (outside an exported program) features that are not finite.
    """

    def __init__(self, spec: PruneSpec) -> None:
        super().__init__()
        self.spec = spec
        rows, columns = spec.grid
        count = spec.tokens
        levels = torch.tensor(spec.levels(), dtype=torch.float32)
        needed = spec.keep - spec.first_pivots
        self.rank_every = RANK_EVERY if needed > 4 * RANK_EVERY else 1
        self.steps = needed + (len(levels) * (self.rank_every - 1) if needed else 0)

        at = torch.arange(count)
        y, x = (at // columns).float(), (at % columns).float()
        ones = torch.ones(count)
        norm = x * x + y * y
        far = ones * 4.0 * float(rows**2 + columns**2)
        # Squared distance to the tokens of a one-hot matrix C (N, T) as one small product: `spread` @ (`locate` @ C +
        # `absent`); a column of C that is empty is `far` from everything.
        constants = {
            "position": at.float()[None, None],
            "tie": (at[None, :] < at[:, None]).float()[None],
            "locate": torch.stack([-2.0 * x, -2.0 * y, ones, norm, -ones])[None],
            "absent": torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])[None, :, None],
            "spread": torch.stack([x, y, norm, ones, far], 1)[None],
            "ones": torch.ones(1, WIDEST, 1),
            "before": (torch.arange(128)[:, None] < torch.arange(128)[None, :]).float()[None],
            "places": torch.arange(WIDEST).float()[None, None],
            "sixteenths": torch.arange(1, 16).float()[None, :, None] / 16.0,
            "slot": torch.arange(spec.token_batch).float()[None, None],
            "batch_start": torch.arange(1, -(-count // spec.token_batch)).float()[None, None] * spec.token_batch,
            "levels": levels[None, :, None],
            "level_number": torch.arange(len(levels)).float()[None, :, None],
            "place": torch.arange(spec.keep).float()[None, :, None],
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    position: Tensor
    tie: Tensor
    locate: Tensor
    absent: Tensor
    spread: Tensor
    ones: Tensor
    before: Tensor
    places: Tensor
    sixteenths: Tensor
    slot: Tensor
    batch_start: Tensor
    levels: Tensor
    level_number: Tensor
    place: Tensor

    def forward(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        exporting = torch.compiler.is_exporting()
        (check_shapes if exporting else check_features)(keys, hidden, self.spec)
        for name, width in (("keys", keys.shape[2]), ("hidden", hidden.shape[2])):
            if width > WIDEST:
                raise SpecError(f"{name} are {width} wide; the static pruner covers at most {WIDEST} channels")
        dtype = hidden.dtype
        keys, hidden = keys.float(), hidden.float()
        pivots = self._pivots(keys)
        similarity = self._similarity(hidden)
        chosen = self._expand(similarity, pivots)  # (B, N, 1) zeros and ones, exactly `keep` ones
        pick = self._pick(chosen)
        tokens = torch.bmm(self._recovery(similarity, chosen, pick), hidden)
        indices = torch.bmm(pick, self._many(self.position.view(1, -1, 1), pick)).view(-1, self.spec.keep)
        return tokens.to(dtype), indices if exporting else indices.long()

    def _pivots(self, keys: Tensor) -> Tensor:
        """One-hot rows of the pivots: (B, N, Dk) -> (B, pivots, N)."""
        batch, count, width = keys.shape
        add_up = self._add_up(keys, width)
        chosen = [_first_largest(torch.bmm(keys.abs(), add_up).view(batch, 1, count), self.position)]
        selected, nearest = chosen[0], None
        for _ in range(1, self.spec.first_pivots):
            away = keys - torch.bmm(chosen[-1], keys)
            distance = torch.bmm(away * away, add_up).view(batch, 1, count)
            nearest = distance if nearest is None else torch.minimum(nearest, distance)
            # Selected tokens get -1, below every distance, so that identical keys still give distinct pivots.
            chosen.append(_first_largest(nearest * (1.0 - selected) - selected, self.position))
            selected = selected + chosen[-1]
        return torch.cat(chosen, 1) if len(chosen) > 1 else chosen[0]

    def _similarity(self, hidden: Tensor) -> Tensor:
        """Cosine similarity on the channels of largest variance: (B, N, D) -> (B, N, N)."""
        if hidden.shape[2] > self.spec.channels:
            hidden = torch.bmm(hidden, self._channel_choice(hidden))
        norm = torch.bmm(hidden * hidden, self._add_up(hidden, hidden.shape[2])).sqrt()
        unit = hidden / norm.clamp(min=1e-12)
        return torch.bmm(unit, unit.transpose(1, 2))

    def _channel_choice(self, hidden: Tensor) -> Tensor:
        """One-hot columns of the `channels` channels of largest variance, in channel order: (B, D, channels)."""
        batch, count, width = hidden.shape
        mean_over_tokens = self._add_up(hidden, count).view(batch, 1, count) * (1.0 / count)
        centred = hidden - torch.bmm(mean_over_tokens, hidden)
        variance = torch.bmm(mean_over_tokens, centred * centred)  # (B, 1, D)
        add_up = self._add_up(hidden, width)
        variance = variance / (torch.bmm(variance, add_up) * (1.0 / width) + 1e-30)  # mean 1, so at most `width`
        # Search the largest threshold that more than `channels` exceed, 16 parts a round, down to the last bit.
        count_parts = self._add_up(hidden, 15).view(batch, 1, 15)
        below = variance[:, :, :1] * 0.0
        span = 2.0 ** math.ceil(math.log2(2 * width))
        while span > 2.0**-36:
            exceeding = torch.bmm(_above(variance, below + self.sixteenths * span), add_up)  # (B, 15, 1)
            too_many = (exceeding - float(self.spec.channels)).clamp(0.0, 1.0)
            span /= 16.0
            below = below + torch.bmm(count_parts, too_many) * span
        exceeding = _above(variance, below)
        least = torch.bmm(_first_largest((exceeding - 1.0) * GRAIN - variance, self.places[:, :, :width]), variance.view(batch, width, 1))
        certain = _above(variance, least)
        tied = exceeding - certain  # equal variance: the first ones fill up
        room = float(self.spec.channels) - torch.bmm(certain, add_up)
        take = certain + tied * (room - self._count_before(tied)).clamp(0.0, 1.0)
        place = self._count_before(take) + (1.0 - take) * (4.0 * width)  # out of reach for the others
        return (1.0 - (place.view(batch, width, 1) - self.places[:, :, : self.spec.channels]).abs()).clamp(0.0, 1.0)

    def _expand(self, similarity: Tensor, pivots: Tensor) -> Tensor:
        """Centrifugal expansion: which tokens stay, (B, N, 1)."""
        batch, used = similarity.shape[0], pivots.shape[1]
        selected = torch.bmm(self._add_up(pivots, used).view(batch, 1, used), pivots)
        nothing = selected * 0.0
        last = float(self.steps + 1)
        state = _State(
            nearness=self._look_at(similarity, pivots.transpose(1, 2)),
            selected=selected,
            step=(1.0 - selected) * last,
            score=nothing,
            rank=nothing,
            passed=nothing + 1.0,  # so that the first step begins a pass
            level=nothing[:, :, :1] - 1.0,
        )
        for number in range(self.steps):
            state = self._step(state, similarity, number, last)
        # The first `keep` by step and, within a step, by score; what no step reached would fill up by its score now.
        score = state.score + (1.0 - state.selected) * (1.0 - self._adjusted(state))
        before = _outer_difference(score * GRAIN)
        earlier = _outer_difference(state.step * -2.0)
        order = ((before + self.tie).clamp(0.0, 1.0) + earlier).clamp(0.0, 1.0)
        place = torch.bmm(order, self._add_up(order, self.spec.tokens))
        return (float(self.spec.keep) - place).clamp(0.0, 1.0)

    def _step(self, state: _State, similarity: Tensor, number: int, last: float) -> _State:
        """Accept from the first batch of the running pass that has something to accept; begin a pass if none has."""
        batch, count, size = similarity.shape[0], self.spec.tokens, self.spec.token_batch
        ones = self._add_up(similarity, count)
        adjusted = self._adjusted(state)
        score = 1.0 - adjusted
        rank, passed, level = state.rank, state.passed, state.level
        accept = self._acceptable(adjusted, level, passed)
        if number % self.rank_every == 0:
            going_on = torch.bmm(accept, ones).clamp(0.0, 1.0)  # (B, 1, 1)
            begin = 1.0 - going_on
            # The next level that accepts anything at all: passes that would accept nothing are skipped.
            reached = torch.bmm(_above(self.levels, adjusted + state.selected * TAKEN), ones).clamp(0.0, 1.0)
            later = (self.level_number - level).clamp(0.0, 1.0)
            useless = torch.bmm((later * (1.0 - reached)).view(batch, 1, -1), self._add_up(later, later.shape[1]))
            level = level + begin * (1.0 + useless)
            frozen = _outer_difference((score - state.selected * TAKEN) * GRAIN)
            order = torch.bmm((frozen + self.tie).clamp(0.0, 1.0), ones).view(batch, 1, count)
            rank = rank + begin * (order - rank)
            passed = state.selected + going_on * (passed - state.selected)
            accept = self._acceptable(adjusted, level, passed)
        first = torch.softmax((accept * (4.0 * count) - rank) * APART, -1)  # one-hot: ranks are whole numbers
        first_rank = torch.bmm(first, rank.view(batch, count, 1))
        if self.batch_start.shape[2]:
            over = (first_rank - self.batch_start + 1.0).clamp(0.0, 1.0)
            start = torch.bmm(over, self._add_up(over, over.shape[2])) * float(size)
        else:
            start = first_rank * 0.0
        slot = (1.0 - ((rank.view(batch, count, 1) - start) - self.slot).abs()).clamp(0.0, 1.0)  # (B, N, T)
        columns = slot * accept.view(batch, count, 1)
        accepted = torch.bmm(columns, self._add_up(columns, size)).view(batch, 1, count)
        selected = state.selected + accepted
        return _State(
            nearness=torch.minimum(state.nearness, self._look_at(similarity, columns)),
            selected=selected,
            step=state.step + accepted * (number + 1.0 - last),
            score=state.score + accepted * score,
            rank=rank,
            passed=(passed + (start + float(size) - rank).clamp(0.0, 1.0)).clamp(0.0, 1.0),
            level=level,
        )

    def _adjusted(self, state: _State) -> Tensor:
        """Similarity to the selected, times the buffer for sparsity: (B, 1, N)."""
        count = self.spec.tokens
        closest, distance = state.nearness[:, :, :count], state.nearness[:, :, count:]
        return -closest * (distance.sqrt() * (self.spec.distance_weight / self.spec.diagonal) + 1.0)

    def _acceptable(self, adjusted: Tensor, level: Tensor, passed: Tensor) -> Tensor:
        """1 for tokens below the threshold of the level that the pass has still to look at: (B, 1, N)."""
        number = (1.0 - (self.level_number - level).abs()).clamp(0.0, 1.0)
        threshold = torch.bmm(number.view(number.shape[0], 1, -1), self._many(self.levels, number))
        return _above(threshold, adjusted + passed * TAKEN)

    def _look_at(self, similarity: Tensor, columns: Tensor) -> Tensor:
        """Nearness of all tokens to those of the one-hot columns: (B, N, N), (B, N, T) -> (B, 1, 2N)."""
        batch, count, width = columns.shape
        located = torch.bmm(self._many(self.locate, columns), columns) + self.absent
        distance = torch.bmm(self._many(self.spread, columns), located)
        closeness = torch.bmm(similarity, columns) - located[:, 4:, :] * 4.0  # an empty column is close to nothing
        both = torch.cat([closeness, -distance], 1)
        largest = functional.max_pool2d(both.view(batch, 2 * count, width, 1), (width, 1), stride=(width, 1))
        return -largest.view(batch, 1, 2 * count)

    def _pick(self, chosen: Tensor) -> Tensor:
        """One-hot rows of the kept tokens in ascending position: (B, N, 1) -> (B, keep, N)."""
        batch, count, _ = chosen.shape
        place = torch.bmm(self._many(self.tie, chosen), chosen) + (1.0 - chosen) * (4.0 * count)
        return (1.0 - (place.view(batch, 1, count) - self.place).abs()).clamp(0.0, 1.0)

    def _recovery(self, similarity: Tensor, chosen: Tensor, pick: Tensor) -> Tensor:
        """The matrix that picks the kept tokens and mixes the dropped ones into them: (B, keep, N)."""
        batch, keep, count = pick.shape
        to_kept = torch.bmm(similarity, pick.transpose(1, 2))  # (B, N, keep)
        stands_for = _first_largest(to_kept, self.place.view(1, 1, keep))
        weight = (stands_for * to_kept * (1.0 - chosen)).transpose(1, 2)  # (B, keep, N)
        ones = self._add_up(weight, count)
        total = torch.bmm(weight, ones)
        mixed = _above(total, torch.bmm(weight.abs(), ones) * CANCELLATION) * self.spec.recovery
        return pick * (1.0 - mixed) + weight * (mixed / total.clamp(min=1e-8))

    def _count_before(self, mask: Tensor) -> Tensor:
        """How many ones stand before each place: (B, 1, W) -> (B, 1, W), in two levels so that nothing is W x W."""
        batch, _, width = mask.shape
        block = next(size for size in (16, 32, 64, 128) if size * size >= width)
        padded = functional.pad(mask, (0, block * block - width)) if block * block > width else mask
        rows = padded.view(batch, block, block)
        before = self._many(self.before[:, :block, :block], mask)
        blocks = torch.bmm(before.transpose(1, 2), torch.bmm(rows, self._add_up(rows, block)))
        return (torch.bmm(rows, before) + blocks).view(batch, 1, block * block)[:, :, :width]

    def _add_up(self, like: Tensor, width: int) -> Tensor:
        """A column of ones: (B, width, 1). A product with it sums an axis."""
        return self._many(self.ones[:, :width], like)

    @staticmethod
    def _many(constant: Tensor, like: Tensor) -> Tensor:
        """The constant once per image of the batch; no operator at all for a batch of one."""
        return constant if like.shape[0] == 1 else constant.expand(like.shape[0], -1, -1)


def _above(high: Tensor, low: Tensor) -> Tensor:
    """1 where high > low, else 0."""
    return ((high - low) * HUGE).clamp(0.0, 1.0)


def _outer_difference(row: Tensor) -> Tensor:
    """Element [i, j] = row[j] - row[i]: (B, 1, N) -> (B, N, N)."""
    return row - row.view(row.shape[0], row.shape[2], 1)


def _first_largest(score: Tensor, position: Tensor) -> Tensor:
    """One-hot of the first largest element along the last axis: (B, R, N), (1, 1, N) -> (B, R, N)."""
    count = score.shape[2]
    tied = (torch.softmax(score * HUGE, -1) * (2.0 * count)).clamp(0.0, 1.0)
    return torch.softmax(tied * GRAIN - position * APART, -1)
