"""VLM-Pruner with static shapes and a fixed number of steps, in the operators of `pruning.arithmetic`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pruning.arithmetic import APART, GRAIN, HUGE, above, equal, first_largest, outer_difference, product
from pruning.method import Features, check_features, check_shapes
from pruning.recovery import recovering
from pruning.spec import PruneSpec, SpecError
from pruning.vlm_pruner.settings import RANK_EVERY, Settings

UNIT = HUGE  # adjusted similarities, thresholds and scores are kept times this: clamping a difference then compares
FAR = 2.0**66  # ranks are kept times this for the same reason, and exceed every threshold
TAKEN = 2.0**64  # beyond any adjusted similarity, threshold or score, in units of 1 / UNIT
WIDEST = 128 * 128  # the most tokens or channels that the constants cover
LARGEST_DISTANCE = 2.0**67  # squared, between two keys: times HUGE it must stay a float32 number
PARTS = 32  # thresholds that a round of the channel search tries at once
OUT_OF_REACH = 4.0 * WIDEST  # a place that no order has
GROUP = 16  # neighbouring channels that are sorted into slots together


@dataclass(frozen=True)
class _Pass:
    """A pass over the tokens that are left, as frozen at its start; rows are (B, 1, N), columns (B, N, ...)."""

    level: Tensor  # (B, 1, 1) its number
    rank: Tensor  # (B, N, 1) place of each token in its order
    start: Tensor  # (B, N, 1) first place of the token's batch, times FAR
    ahead: Tensor  # row: above the start of a batch where the token comes after that batch, below it elsewhere
    order: Tensor  # row: the rank times APART, so that a softmax tells two of them apart
    slot: Tensor  # (B, N, token_batch) the rank minus 0, 1, 2 ..., times FAR


class TokenPruner(nn.Module):
    """Keep `spec.keep` of N image tokens.

    (keys (B, N, Dk), hidden (B, N, D)) -> (tokens (B, keep, D), indices (B, keep)). `keys` are those of the layer
    before the cut, after rotary embedding, all heads side by side; `hidden` is what enters the cut. Tokens come out in
    ascending position with the dtype of `hidden`; arithmetic is float32 throughout. Indices are int64; in an exported
    program they are float32 whole numbers, because mobile delegates have no int64 and a cast would be the one operator
    that they leave outside.

    The result equals `reference.prune` unless the steps run out before `keep` tokens are selected; then the tokens
    closest to being accepted fill up, so that it is `keep` tokens all the same, and `select` says how many they were.

    Source: arXiv 2512.02700; the static form is our own.

    Raises:
        SpecError: shapes that do not fit, or (outside an exported program) features that are not finite or keys too
            large to be told apart.
    """

    def __init__(self, spec: PruneSpec) -> None:
        super().__init__()
        settings = Settings.of(spec)
        self.spec, self.settings = spec, settings
        count = spec.tokens
        levels = torch.tensor(settings.levels(), dtype=torch.float32)
        self.steps = self.settings.static_steps(spec.keep)

        at = torch.arange(count)
        middle = torch.tensor(spec.extent) // 2
        y, x = (torch.tensor(spec.places()) - middle).float().unbind(1)
        square, one = y * y + x * x, torch.ones(count)
        self.reach = float(spec.extent[0] ** 2 + spec.extent[1] ** 2)  # more than the largest squared distance
        ones, places = torch.ones(1, WIDEST, 1), torch.arange(WIDEST).float()[None, None]
        self.batches, self.blocks = -(-count // settings.token_batch), -(-settings.channels // GROUP)
        widths = {
            count,
            spec.keep,
            settings.token_batch,
            settings.first_pivots(spec.keep),
            self.steps,
            RANK_EVERY,
            len(levels),
            PARTS - 1,
        }
        widths |= {self.batches - 1, self.blocks - 1}
        constants = {
            "ones": ones,
            "places": places,
            # The same, cut to every width that is known already: cutting in the graph would be an operator each time.
            **{f"ones_{width}": ones[:, :width] for width in widths},
            **{
                f"places_{width}": places[:, :, :width]
                for width in (count, spec.keep, settings.token_batch, GROUP, self.blocks)
            },
            "rank_of_slot": places[:, :, : settings.token_batch] * FAR,
            "position": places[:, :, :count].view(1, -1, 1),
            "place_kept": places[:, :, : spec.keep].view(1, -1, 1),
            "rewind": places[:, :, : self.steps].view(1, -1, 1) - float(self.steps),
            "tie": (at[None, :] < at[:, None]).float()[None],
            "before": (torch.arange(128)[:, None] < torch.arange(128)[None, :]).float()[None],
            "parts": torch.arange(1, PARTS).float()[None, :, None] / PARTS,
            # Their product is the nearness of two tokens: `reach` minus the squared distance, in whole numbers.
            "from_here": torch.stack([one, square, y, x], 1)[None],
            "to_there": torch.stack([self.reach - square, -one, 2.0 * y, 2.0 * x])[None],
            "batch_end": torch.arange(1, self.batches).float()[None, None] * settings.token_batch - 1.0,
            "block_end": torch.arange(1, self.blocks).float()[None, None] * GROUP - 1.0,
            "level": torch.arange(len(levels)).float()[None, :, None],
            "threshold": levels[None, :, None] * UNIT,
        }
        for name, value in constants.items():
            # Where nothing follows the pivots there are no steps, and of one batch or block no ends. Not every engine's
            # file can hold a tensor without elements.
            if value.numel():
                self.register_buffer(name, value.clone(), persistent=False)

    ones: Tensor
    places: Tensor
    rank_of_slot: Tensor
    position: Tensor
    place_kept: Tensor
    rewind: Tensor
    tie: Tensor
    before: Tensor
    parts: Tensor
    from_here: Tensor
    to_there: Tensor
    batch_end: Tensor
    block_end: Tensor
    level: Tensor
    threshold: Tensor

    def forward(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        tokens, indices, _ = self.select(keys, hidden)
        return tokens, indices

    def select(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like `forward`, and (B, 1) float32: how many tokens the fill rule had to choose because the steps ran out."""
        exporting = torch.compiler.is_exporting()
        (check_shapes if exporting else check_features)(Features(hidden=hidden, keys=keys), self.spec)
        for name, width in (("keys", keys.shape[2]), ("hidden", hidden.shape[2])):
            if width > WIDEST:
                raise SpecError(f"{name} are {width} wide; the static pruner covers at most {WIDEST} channels")
        if not exporting:
            largest, bound = float(keys.abs().max()), math.sqrt(LARGEST_DISTANCE / (4.0 * keys.shape[2]))
            if largest > bound:
                raise SpecError(f"keys reach {largest:.3g}; the static pruner tells distances apart up to {bound:.3g}")
        tokens, indices, filled = self.select_unread(keys, hidden)
        return tokens, indices if exporting else indices.long(), filled

    def select_unread(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like `select` for features that it would take, with indices as float32 whole numbers.

        No value is read by the host, so that a CUDA graph can hold it; of NaN and infinity it makes nonsense.
        """
        dtype = hidden.dtype
        keys, hidden = (x if x.dtype == torch.float32 else x.float() for x in (keys, hidden))  # no operator for nothing
        pivots = self._pivots(keys)
        similarity = self._similarity(hidden)
        chosen, filled = self._expand(similarity, pivots)
        pick = self._pick(chosen)
        tokens = torch.bmm(self._recovery(similarity, chosen, pick), hidden)
        indices = torch.bmm(pick, self._many(self.position, pick)).view(-1, self.spec.keep)
        return tokens.to(dtype), indices, filled.view(-1, 1)

    def _pivots(self, keys: Tensor) -> Tensor:
        """One-hot rows of the pivots: (B, N, Dk) -> (B, pivots, N)."""
        batch, count, width = keys.shape
        add_up = self._add_up(keys, width)
        norm = torch.bmm(keys.abs(), add_up).view(batch, 1, count)
        chosen = [first_largest(norm, self._places(count))]
        selected, nearest = chosen[0], None
        for number in range(1, self.settings.first_pivots(self.spec.keep)):
            away = keys - torch.bmm(chosen[-1], keys)
            distance = torch.bmm(away * away, add_up).view(batch, 1, count)
            nearest = distance if nearest is None else torch.minimum(nearest, distance)
            score = norm if number < self.settings.norm_pivots else nearest
            # Selected tokens get -1, below every distance, so that identical keys still give distinct pivots.
            chosen.append(first_largest(score * (1.0 - selected) - selected, self._places(count)))
            selected = selected + chosen[-1]
        return torch.cat(chosen, 1) if len(chosen) > 1 else chosen[0]

    def _similarity(self, hidden: Tensor) -> Tensor:
        """Cosine similarity on the channels of largest variance: (B, N, D) -> (B, N, N)."""
        if hidden.shape[2] > self.settings.channels:
            hidden = self._compact(hidden, self._channel_places(hidden))
        norm = product(hidden * hidden, self._add_up(hidden, hidden.shape[2])).sqrt()
        unit = hidden / norm.clamp(min=1e-12)
        return product(unit, unit.transpose(1, 2))

    def _channel_places(self, hidden: Tensor) -> Tensor:
        """Places of the `channels` channels of largest variance among them, the others out of reach: (B, 1, D)."""
        batch, count, width = hidden.shape
        mean_over_tokens = self._add_up(hidden, count).view(batch, 1, count) * (1.0 / count)
        centred = hidden - torch.bmm(mean_over_tokens, hidden)
        variance = torch.bmm(mean_over_tokens, centred * centred)  # (B, 1, D)
        add_up = self._add_up(hidden, width)
        variance = variance / (torch.bmm(variance, add_up) * (1.0 / width) + 1e-30)  # mean 1, so at most `width`
        # Search the largest threshold that more than `channels` exceed, down to the last bit.
        count_parts = self._add_up(hidden, PARTS - 1).view(batch, 1, PARTS - 1)
        below = variance[:, :, :1] * 0.0
        span = 2.0 ** math.ceil(math.log2(2 * width))
        while span > 2.0**-36:
            exceeding = torch.bmm(above(variance, below + self.parts * span), add_up)  # (B, PARTS - 1, 1)
            too_many = (exceeding - float(self.settings.channels)).clamp(0.0, 1.0)
            span /= PARTS
            below = below + torch.bmm(count_parts, too_many) * span
        exceeding = above(variance, below)
        least = torch.bmm(
            first_largest((exceeding - 1.0) * GRAIN - variance, self._places(width)),
            variance.view(batch, width, 1),
        )
        certain = above(variance, least)
        tied = exceeding - certain  # equal variance: the first ones fill up
        room = float(self.settings.channels) - torch.bmm(certain, add_up)
        take = certain + tied * (room - self._count_before(tied)).clamp(0.0, 1.0)
        return self._count_before(take) + (1.0 - take) * OUT_OF_REACH

    def _compact(self, hidden: Tensor, place: Tensor) -> Tensor:
        """The chosen channels side by side, in any order, perhaps with empty ones: (B, N, D) -> (B, N, about channels).

        One product with a one-hot matrix would cost as much as all else. Chosen channels of a group of neighbours have
        consecutive places, so a small product per group can bring each to slot `place % GROUP`, and a second one per
        slot collects over the groups, to the block `place // GROUP`.
        """
        batch, count, width = hidden.shape
        groups = -(-width // GROUP)
        if groups * GROUP > width:
            hidden = functional.pad(hidden, (0, groups * GROUP - width))
            place = functional.pad(place, (0, groups * GROUP - width), value=OUT_OF_REACH)
        slot, blocks = place.view(batch, groups * GROUP, 1), self.blocks
        block = slot * 0.0
        if blocks > 1:
            block = torch.bmm((slot - self.block_end).clamp(0.0, 1.0), self._add_up(hidden, blocks - 1))
            slot = slot - block * float(GROUP)
        to_slot = equal(slot, self._places(GROUP)).view(batch * groups, GROUP, GROUP)
        in_block = equal(block, self._places(blocks)).view(batch * groups, GROUP, blocks)
        to_block = torch.bmm(to_slot.transpose(1, 2), in_block)  # (B * groups, slots, blocks)
        to_block = to_block.view(batch, groups, GROUP, blocks).transpose(1, 2).reshape(batch * GROUP, groups, blocks)
        grouped = hidden.view(batch, count, groups, GROUP).transpose(1, 2).reshape(batch * groups, count, GROUP)
        slotted = torch.bmm(grouped, to_slot).view(batch, groups, count, GROUP).permute(0, 3, 2, 1)
        blocked = torch.bmm(slotted.reshape(batch * GROUP, count, groups), to_block)
        blocked = blocked.view(batch, GROUP, count, blocks).transpose(1, 2)
        return blocked.reshape(batch, count, GROUP * blocks)

    def _expand(self, similarity: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
        """Centrifugal expansion: which tokens stay, (B, N, 1) with `keep` ones, and how many of them filled up.

        A step accepts from the first batch of the running pass that has something to accept; batches without are
        skipped, because they change nothing.
        """
        batch, count, used = similarity.shape[0], self.spec.tokens, pivots.shape[1]
        ones = self._add_up(similarity, count)
        columns = pivots.transpose(1, 2)
        selected = is_pivot = torch.bmm(columns, self._add_up(pivots, used))  # (B, N, 1)
        # Never negative, like nearness: an empty column looks up zeros and does not count.
        similarity = similarity + 1.0
        looked_up = self._look_up(similarity, columns).view(batch, 2 * count, used, 1)
        closest = functional.max_pool2d(looked_up, (used, 1), stride=(used, 1))  # (B, 2N, 1, 1)
        size = self.settings.token_batch
        running: _Pass | None = None
        limit = selected  # not used before the first pass sets it
        accepted: list[Tensor] = []
        similar: list[Tensor] = []
        for number in range(self.steps):
            adjusted = self._adjusted(closest)
            if number % RANK_EVERY == 0:
                if number:
                    recent = torch.cat(accepted[-RANK_EVERY:], 2)
                    selected = selected + torch.bmm(recent, self._add_up(recent, RANK_EVERY))
                running, limit = self._begin_pass(running, limit, adjusted, selected)
            assert running is not None
            accept = (limit - adjusted).clamp(0.0, 2.0 * APART * count)
            first = torch.softmax(accept - running.order, -1)  # one-hot: ranks are whole numbers
            start = torch.bmm(first, running.start)
            hit = (running.slot - start).abs()
            columns = (accept.view(batch, count, 1) - hit).clamp(0.0, 1.0)  # one-hot columns of the accepted tokens
            accepted.append(torch.bmm(columns, self._add_up(columns, size)))
            similar.append(adjusted)
            limit = torch.minimum(limit, running.ahead - start)
            looked_up = self._look_up(similarity, columns).view(batch, 2 * count, size, 1)
            closest = functional.max_pool2d(torch.cat([looked_up, closest], 2), (size + 1, 1), stride=(size + 1, 1))
        # The first `keep` by step and, within a step, by score; tokens that no step reached come last, by score.
        keep = float(self.spec.keep)
        score = (UNIT - self._adjusted(closest)).view(batch, count, 1)
        selected = is_pivot
        when = 1.0 - is_pivot  # pivots come first
        score = score - score * is_pivot
        if accepted:
            taken = torch.cat(accepted, 2)  # (B, N, steps)
            selected = selected + torch.bmm(taken, self._add_up(taken, self.steps))
            when = when * (self.steps + 1.0) + torch.bmm(taken, self._many(self.rewind, taken))
            then = (UNIT - torch.cat(similar, 1)).transpose(1, 2) - score
            score = score + torch.bmm(then * taken, self._add_up(taken, self.steps))
        before = (outer_difference(score) + self.tie).clamp(0.0, 1.0)
        order = (outer_difference(when * -2.0) + before).clamp(0.0, 1.0)
        filled = (keep - torch.bmm(ones.view(batch, 1, count), selected)).clamp(0.0, keep)
        return (keep - torch.bmm(order, ones)).clamp(0.0, 1.0), filled

    def _begin_pass(
        self, running: _Pass | None, limit: Tensor, adjusted: Tensor, selected: Tensor
    ) -> tuple[_Pass, Tensor]:
        """A new pass if the running one has nothing left to accept, and what a token's adj must be below."""
        batch, count, size, levels = len(adjusted), self.spec.tokens, self.settings.token_batch, self.level.shape[1]
        ones = self._add_up(adjusted, count)
        taken = selected.view(batch, 1, count) * TAKEN
        left = adjusted + taken
        # Levels that accept nothing are skipped: the first useful one is as far as the number of useless ones.
        useful = torch.bmm((self.threshold - left).clamp(0.0, 1.0), ones).clamp(0.0, 1.0)
        level = float(levels) - torch.bmm(self._add_up(useful, levels).view(batch, 1, levels), useful)
        rank = torch.bmm((outer_difference(UNIT - left) + self.tie).clamp(0.0, 1.0), ones)
        if running is not None:
            going_on = torch.bmm((limit - adjusted).clamp(0.0, 1.0), ones).clamp(0.0, 1.0)
            begin = 1.0 - going_on
            level = running.level + begin * ((level - running.level - 1.0).clamp(0.0, float(levels)) + 1.0)
            rank = running.rank + begin * (rank - running.rank)
        number = equal(self.level, level)
        below = torch.bmm(number.view(batch, 1, levels), self._many(self.threshold, number)) - taken
        if running is not None:
            below = below * begin + limit * going_on
        row = rank.view(batch, 1, count)
        if self.batches > 1:
            full = (rank - self.batch_end).clamp(0.0, 1.0)  # (B, N, batches): whole batches before the token
            start = torch.bmm(full, self._add_up(full, full.shape[2])) * (size * FAR)
        else:
            start = rank * 0.0
        began = _Pass(
            level=level,
            rank=rank,
            start=start,
            ahead=(row - (size - 0.5)) * FAR,
            order=row * APART,
            slot=rank * FAR - self.rank_of_slot,
        )
        return began, below

    def _look_up(self, similarity: Tensor, columns: Tensor) -> Tensor:
        """Similarity and nearness to the tokens of one-hot columns: (B, N, N), (B, N, C) -> (B, 2N, C)."""
        nearness = torch.bmm(
            self._many(self.from_here, columns), torch.bmm(self._many(self.to_there, columns), columns)
        )
        return torch.cat([torch.bmm(similarity, columns), nearness], 1)

    def _adjusted(self, closest: Tensor) -> Tensor:
        """Similarity to the selected, times the buffer for sparsity, in units: (B, 2N, 1, 1) -> (B, 1, N)."""
        count = self.spec.tokens
        slope = self.settings.distance_slope(self.spec.extent) * UNIT
        buffer = (self.reach - closest[:, count:]).sqrt() * slope + UNIT
        return ((closest[:, :count] - 1.0) * buffer).view(-1, 1, count)

    def _pick(self, chosen: Tensor) -> Tensor:
        """One-hot rows of the kept tokens in ascending position: (B, N, 1) -> (B, keep, N)."""
        batch, count, _ = chosen.shape
        place = torch.bmm(self._many(self.tie, chosen), chosen) + (1.0 - chosen) * (4.0 * count)
        return equal(place.view(batch, 1, count), self.place_kept)

    def _recovery(self, similarity: Tensor, chosen: Tensor, pick: Tensor) -> Tensor:
        """The matrix that picks the kept tokens and mixes the dropped ones into them: (B, keep, N)."""
        if not self.settings.recovery:
            return pick
        return recovering(
            similarity,
            chosen,
            pick,
            self.settings.recovery,
            ones=self._add_up(pick, self.spec.tokens),
            places=self._places(self.spec.keep),
        )

    def _count_before(self, mask: Tensor) -> Tensor:
        """How many ones stand before each place: (B, 1, W) -> (B, 1, W), in two levels so that nothing is W x W."""
        batch, _, width = mask.shape
        block = next(size for size in (16, 32, 64, 128) if size * size >= width)
        padded = functional.pad(mask, (0, block * block - width)) if block * block > width else mask
        rows = padded.view(batch, block, block)
        before = self._many(self.before[:, :block, :block], mask)
        blocks = torch.bmm(before.transpose(1, 2), torch.bmm(rows, self._add_up(rows, block)))
        places = (torch.bmm(rows, before) + blocks).view(batch, 1, block * block)
        return places[:, :, :width] if block * block > width else places

    def _add_up(self, like: Tensor, width: int) -> Tensor:
        """A column of ones: (B, width, 1). A product with it sums an axis."""
        known = self._buffers.get(f"ones_{width}")
        return self._many(self.ones[:, :width] if known is None else known, like)

    def _places(self, width: int) -> Tensor:
        """A row of 0, 1, 2 ...: (1, 1, width)."""
        known = self._buffers.get(f"places_{width}")
        return self.places[:, :, :width] if known is None else known

    @staticmethod
    def _many(constant: Tensor, like: Tensor) -> Tensor:
        """The constant once per image of the batch; no operator at all for a batch of one."""
        return constant if like.shape[0] == 1 else constant.expand(like.shape[0], -1, -1)
