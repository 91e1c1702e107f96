"""VLM-Pruner with static shapes for engines that compute in float16 and can compare, such as a Snapdragon's NPU.

The other static form tells numbers apart by multiplying their differences with 2^60, which float16 cannot hold. Here
comparisons, selects and the smallest of a row do that work. Every count and place is a whole number that float16 holds,
and the numbers that decide are kept small, because float16 is finest near zero: one minus the similarity instead of the
similarity, deviations from a mean instead of the numbers themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pruning.reference import CANCELLATION, check_features, check_shapes, squared_distances
from pruning.spec import RANK_EVERY, PruneSpec, SpecError

BEYOND = 16384.0  # above every place and score, and far from float16's largest number
MOST_TOKENS = 1024  # places and halves between them are exact in float16 up to here
LEAST = 2.0**-13  # smaller divisors are no longer precise in float16


class ComparingPruner(nn.Module):
    """Keep `spec.keep` of N image tokens: `TokenPruner`'s interface and choices, in the dtype of the features.

    In float32 it differs from `reference.prune` only where two numbers tie to the last bits, because it adds up in
    another order. In float16 more of them tie, and those choices fall either way.

    Source: arXiv 2512.02700; the static form is our own.

    Raises:
        SpecError: more than MOST_TOKENS tokens, shapes that do not fit, or (outside an exported program) features that
            are not finite.
    """

    buffering: Tensor
    places: Tensor
    earlier: Tensor
    thresholds: Tensor

    def __init__(self, spec: PruneSpec) -> None:
        super().__init__()
        if spec.tokens > MOST_TOKENS:
            raise SpecError(
                f"grid={spec.grid} has {spec.tokens} tokens; the float16 form can place {MOST_TOKENS} at most"
            )
        self.spec = spec
        self.steps = spec.default_steps if spec.steps is None else min(spec.steps, spec.sure_steps)
        at = torch.arange(spec.tokens)
        constants = {
            "buffering": (squared_distances(spec).sqrt() * spec.distance_slope).float()[None],
            "places": at.float()[None, None],
            "earlier": (at[None, :] < at[:, None]).float()[None],  # [i, j] is 1 where j comes before i
            "thresholds": 1.0 - torch.tensor(spec.levels(), dtype=torch.float32)[None, None],
        }
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def forward(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        tokens, indices, _ = self.select(keys, hidden)
        return tokens, indices

    def select(self, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Like `forward`, and (B, 1): how many tokens the fill rule had to choose because the steps ran out."""
        exporting = torch.compiler.is_exporting()
        (check_shapes if exporting else check_features)(keys, hidden, self.spec)
        apart = self._apart(hidden)
        chosen, filled = self._expand(apart, self._pivots(keys))
        pick = self._pick(chosen)
        tokens = torch.bmm(self._recovery(apart, chosen, pick), hidden)
        indices = (pick * self.places).sum(2)
        return tokens, indices if exporting else indices.long(), filled.view(-1, 1)

    def _pivots(self, keys: Tensor) -> Tensor:
        """1 where a token is a pivot: (B, N, Dk) -> (B, 1, N)."""
        keys = keys / keys.abs().amax((1, 2), keepdim=True).clamp(min=LEAST)  # or the squares could overflow
        sizes = keys.abs()
        newest = self._first_largest((sizes - sizes.mean(1, keepdim=True)).sum(2)[:, None])
        selected, nearest, usual = newest, None, None
        for _ in range(1, self.spec.first_pivots):
            away = keys - torch.bmm(newest, keys)
            squares = away * away
            usual = squares.mean(1, keepdim=True) if usual is None else usual
            distance = (squares - usual).sum(2)[:, None]
            nearest = distance if nearest is None else torch.minimum(nearest, distance)
            # Selected tokens are out of reach, so that identical keys still give distinct pivots.
            newest = self._first_largest(nearest - selected * BEYOND)
            selected = selected + newest
        return selected

    def _apart(self, hidden: Tensor) -> Tensor:
        """1 - cosine similarity on the channels of largest variance: (B, N, D) -> (B, N, N)."""
        if hidden.shape[2] > self.spec.channels:
            centred = hidden - hidden.mean(1, keepdim=True)
            reach = centred.abs().amax(1, keepdim=True)
            share = centred / reach.clamp(min=LEAST)
            spread = reach * (share * share).mean(1, keepdim=True).sqrt()  # without squares beyond float16
            least = spread.topk(self.spec.channels, dim=2).values[:, :, -1:]
            hidden = hidden * (spread >= least).to(hidden.dtype)
        row = hidden / hidden.abs().amax(2, keepdim=True).clamp(min=LEAST)
        unit = row / (row * row).sum(2, keepdim=True).sqrt().clamp(min=LEAST)
        # Rounding makes the vectors a little longer or shorter than 1: once that is put right in each number, the rest
        # is taken out of the similarities. Every sum holds all terms of its result: engines add up in float32, and
        # only the small total is rounded.
        one = unit[:, :, :1] * 0.0 + 1.0
        unit = unit - unit * self._excess(unit, one)
        excess = self._excess(unit, one)
        here, there = torch.cat([unit, one, excess, one], 2), torch.cat([-unit, one, one, excess], 2)
        return torch.bmm(here, there.transpose(1, 2))

    @staticmethod
    def _excess(unit: Tensor, one: Tensor) -> Tensor:
        """By how much each vector is longer than 1: (B, N, D), (B, N, 1) -> (B, N, 1)."""
        return torch.cat([unit * unit, -one], 2).sum(2, keepdim=True) * 0.5

    def _expand(self, apart: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor]:
        """Centrifugal expansion: (B, 1, N) with 1 for the `keep` tokens that stay, and how many of them filled up.

        A step accepts from the first batch of the running pass that has something to accept. Tokens are scored by one
        minus their adjusted similarity.
        """
        size, keep, dtype = self.spec.token_batch, float(self.spec.keep), apart.dtype
        both = torch.cat([apart, self.buffering.expand(len(apart), -1, -1)], 1)  # (B, 2N, N)
        nearest = self._nearest(both, pivots)
        selected = pivots
        when = (1.0 - pivots) * (self.steps + 1.0)  # pivots come first, tokens that no step reaches last
        scored = pivots * 0.0
        nothing = pivots[:, :, :1] * 0.0
        limit = level = rank = behind = nothing  # a pass: what scores must exceed, its number, places, batches done
        for number in range(self.steps):
            score = self._score(nearest)
            left = score - selected * BEYOND
            if number % RANK_EVERY == 0:
                # A new pass if the running one has nothing left to accept; levels that accept nothing are skipped.
                going_on = nothing
                if number:
                    going_on = ((left > limit) & (rank >= behind)).to(dtype).amax(2, keepdim=True)
                begin = 1.0 - going_on
                useless = (self.thresholds >= left.amax(2, keepdim=True)).to(dtype).sum(2, keepdim=True)
                useful = torch.maximum(useless, level + 1.0) if number else useless
                level = level * going_on + useful * begin
                at_level = (self.places[:, :, : self.thresholds.shape[2]] == level).to(dtype)
                limit = (self.thresholds * at_level).sum(2, keepdim=True)
                rank = rank * going_on + self._rank(left) * begin
                behind = behind * going_on
            accept = (left > limit) & (rank >= behind)
            first = torch.where(accept, rank, BEYOND).amin(2, keepdim=True)
            behind = (torch.floor(first * (1.0 / size) + 0.5 / size) + 1.0) * size
            taken = (accept & (rank < behind)).to(dtype)
            when = when - taken * float(self.steps - number)
            scored = scored + taken * score
            selected = selected + taken
            nearest = torch.minimum(nearest, self._nearest(both, taken))
        scored = scored + self._score(nearest) * (1.0 - selected)
        filled = torch.relu(keep - selected.sum(2))
        return (self._rank(scored, before=when) < keep).to(dtype), filled

    def _nearest(self, both: Tensor, tokens: Tensor) -> Tensor:
        """How near each token is to the nearest of some, in features and on the grid: (B, 2N, N) -> (B, 2N, 1)."""
        return (both + (1.0 - tokens) * BEYOND).amin(2, keepdim=True)

    def _score(self, nearest: Tensor) -> Tensor:
        """(B, 2N, 1) -> (B, 1, N)"""
        count = self.spec.tokens
        apart, buffer = nearest[:, :count], nearest[:, count:]
        return (apart - (1.0 - apart) * buffer).view(-1, 1, count)

    def _rank(self, score: Tensor, *, before: Tensor | None = None) -> Tensor:
        """Place of each token when the largest score comes first, or the smallest `before`: (B, 1, N) -> (B, 1, N)."""
        own = score.transpose(1, 2)
        ahead = torch.where(score == own, self.earlier, (score > own).to(score.dtype))
        if before is not None:
            own = before.transpose(1, 2)
            ahead = torch.where(before == own, ahead, (before < own).to(score.dtype))
        return ahead.sum(2)[:, None]

    def _pick(self, chosen: Tensor) -> Tensor:
        """One-hot rows of the kept tokens in ascending position: (B, 1, N) -> (B, keep, N)."""
        place = (self.earlier * chosen).sum(2)[:, None]
        return (place == self._slots()).to(chosen.dtype) * chosen

    def _recovery(self, apart: Tensor, chosen: Tensor, pick: Tensor) -> Tensor:
        """The matrix that picks the kept tokens and mixes the dropped ones into them: (B, keep, N)."""
        to_kept = torch.bmm(pick, apart)
        slot = torch.where(to_kept <= to_kept.amin(1, keepdim=True), self._slots(), BEYOND).amin(1, keepdim=True)
        weight = (self._slots() == slot).to(apart.dtype) * (1.0 - to_kept) * (1.0 - chosen)
        total = weight.sum(2, keepdim=True)
        mixed = (total > weight.abs().sum(2, keepdim=True) * CANCELLATION).to(apart.dtype) * self.spec.recovery
        return pick * (1.0 - mixed) + weight * (mixed / total.clamp(min=LEAST))

    def _slots(self) -> Tensor:
        """A column of 0, 1, 2 ...: (1, keep, 1)."""
        return self.places[:, :, : self.spec.keep].transpose(1, 2)

    def _first_largest(self, score: Tensor) -> Tensor:
        """One-hot of the first largest element of a row: (B, 1, N) -> (B, 1, N)."""
        first = torch.where(score >= score.amax(2, keepdim=True), self.places, BEYOND).amin(2, keepdim=True)
        return (self.places == first).to(score.dtype)
