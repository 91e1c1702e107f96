"""The static form of a method that ranks tokens: what all of these share, in the operators of `pruning.arithmetic`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pruning.arithmetic import COARSE, HUGE, LEAST_NORM, equal, first_largest, outer_difference, product
from pruning.method import Features, Kept, Need, needed
from pruning.spec import PruneSpec, SpecError

WIDEST = 128 * 128  # the most channels that the constants cover
FAR = 4.0  # more than any two rows are apart


class Chooser(nn.Module):
    """Features -> Kept for a choice that `decided` makes, in float32 whatever the dtype of the features.

    Rows are (B, 1, N), columns (B, N, 1).
    """

    ones: Tensor
    places: Tensor
    position: Tensor
    place_kept: Tensor
    tie: Tensor
    filled: Tensor

    def __init__(self, spec: PruneSpec, needs: frozenset[Need]) -> None:
        super().__init__()
        self.spec, self.needs = spec, needs
        at = torch.arange(spec.tokens).float()
        self.constants(
            ones=torch.ones(1, WIDEST, 1),
            places=at[None, None],
            position=at[None, :, None],
            place_kept=torch.arange(spec.keep).float()[None, :, None],
            tie=(at[None, :] < at[:, None]).float()[None],
            filled=torch.zeros(1, 1),
        )

    def constants(self, **values: Tensor) -> None:
        """Registers tensors that are built, not saved."""
        for name, value in values.items():
            self.register_buffer(name, value.clone(memory_format=torch.contiguous_format), persistent=False)

    def decided(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Chooses `keep` tokens: a column of that many ones, and the (B, N, N) that `mix` makes of it."""
        raise NotImplementedError

    def mix(self, pick: Tensor, chosen: Tensor, becomes: Tensor | None) -> Tensor:
        """What kept tokens are made of, (B, keep, N) times hidden, where `pick` is one-hot and `chosen` the column.

        By default `becomes` says what each token becomes, and None in its place leaves them as they are.
        """
        return pick if becomes is None else torch.bmm(pick, becomes)

    def forward(self, features: Features) -> Kept:
        """What the method needs of the features -> tokens (B, keep, D), indices (B, keep), filled (B, 1)"""
        given = needed(features, self.spec, self.needs)
        for name, x in zip(Features._fields, given, strict=True):
            if x is not None and x.dim() == 3 and x.shape[2] > WIDEST:
                raise SpecError(f"{name} is {x.shape[2]} wide; the static pruner covers at most {WIDEST} channels")
        dtype = given.hidden.dtype
        given = Features(_single(given.hidden), *(None if x is None else _single(x) for x in given[1:]))
        chosen, becomes = self.decided(given)
        images = len(chosen)
        place = torch.bmm(self.many(self.tie, images), chosen) + (1.0 - chosen) * (4.0 * self.spec.tokens)
        pick = equal(place.view(images, 1, self.spec.tokens), self.place_kept)  # one-hot rows in ascending position
        indices = torch.bmm(pick, self.many(self.position, images)).view(images, self.spec.keep)
        return Kept(
            torch.bmm(self.mix(pick, chosen, becomes), given.hidden).to(dtype),
            indices if torch.compiler.is_exporting() else indices.long(),
            self.filled.expand(images, -1),
        )

    def total(self, rows: Tensor) -> Tensor:
        """The sum of each row: (B, M, K) -> (B, M, 1)."""
        return torch.bmm(rows, self.many(self.ones[:, : rows.shape[2]], len(rows)))

    def unit(self, rows: Tensor) -> Tensor:
        """Rows brought to length 1: (B, N, D) -> (B, N, D)."""
        return rows / product(rows * rows, self.many(self.ones[:, : rows.shape[2]], len(rows))).sqrt().clamp(
            min=LEAST_NORM
        )

    def newest(self, score: Tensor, selected: Tensor | None = None) -> Tensor:
        """One-hot of the first largest score, above -1, of the tokens that are not selected: rows -> row."""
        if selected is not None:
            score = score * (1.0 - selected) - selected
        return first_largest(score, self.places)

    def farthest(self, first: Tensor, distance: Tensor, weight: Tensor | None = None) -> Tensor:
        """A column of ones where `oracle.farthest` chooses: rows and (B, N, N) -> (B, N, 1)."""
        newest = selected = self.newest(first)
        nearest = torch.bmm(newest, distance)
        for step in range(1, self.spec.keep):
            newest = self.newest(nearest if weight is None else weight * nearest, selected)
            selected = selected + newest
            if step + 1 < self.spec.keep:
                nearest = torch.minimum(nearest, torch.bmm(newest, distance))
        return self.column(selected)

    def before(self, score: Tensor) -> Tensor:
        """1 where token j comes before token i, the larger score first: a row -> (B, N, N).

        Differences are 0 or above 2^-60.
        """
        return (outer_difference(score) * HUGE + self.tie).clamp(0.0, 1.0)

    def first(self, before: Tensor) -> Tensor:
        """The `keep` tokens that the fewest come before: (B, N, N) -> column of ones."""
        return (float(self.spec.keep) - self.total(before)).clamp(0.0, 1.0)

    def shares(self, attention: Tensor) -> Tensor:
        """Attention as numbers that `before` can tell apart: (B, N) -> row."""
        return attention.view(-1, 1, self.spec.tokens) * float(self.spec.tokens) + COARSE

    def column(self, row: Tensor) -> Tensor:
        """A row as a column."""
        return row.view(len(row), -1, 1)

    @staticmethod
    def many(constant: Tensor, images: int) -> Tensor:
        """The constant once per image of the batch; no operator at all for a batch of one."""
        return constant if images == 1 else constant.expand(images, -1, -1)


def _single(x: Tensor) -> Tensor:
    """As float32, without an operator where it is."""
    return x if x.dtype == torch.float32 else x.float()


def apart(left: Tensor, right: Tensor) -> Tensor:
    """1 - cosine of rows of length 1, in multiples of 2^-20: (B, M, D), (B, N, D) -> (B, M, N)."""
    return (COARSE + 1.0) - (product(left, right.transpose(1, 2)) + COARSE)
