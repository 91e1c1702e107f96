"""What kept tokens hold after recovery, for any set of kept tokens and either decision of a near tie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from runtime.errors import BundleError
from runtime.golden import RECOVERY_PARTS, recovery_key

# Sweeps over the tokens that may go either way; each must lower the error, and two were the most that any case needed.
_SWEEPS = 8


class Standing(NamedTuple):
    """Which kept token each dropped one is mixed into: `slot` (N,) counts kept tokens, -1 for these themselves.

    `margin` (N,) says by how much the similarity to that one leads over the runner-up, infinite for kept tokens.
    """

    slot: np.ndarray
    margin: np.ndarray


class Moved(NamedTuple):
    """A dropped token that went to another kept token than the desktop's, as indices of image tokens.

    `margin` is how much more similar it is to `desktop` than to `engine`.
    """

    token: int
    desktop: int
    engine: int
    margin: float


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The desktop's features at the cut, from which a kept token's row follows for every decision.

    hidden       (N, D) what enters the cut, before recovery
    similarity   (N, N) the similarities that decide who stands for whom, and weigh
    share        of a kept token that is replaced by the mean of those it stands for
    least_share  of the sum of absolute weights that the sum of weights must exceed, or nothing is mixed

    Source: arXiv 2512.02700, section 3.4; float64 throughout.
    """

    hidden: np.ndarray
    similarity: np.ndarray
    share: float
    least_share: float

    @classmethod
    def from_golden(cls, golden: Mapping[str, np.ndarray], *, tokens: int, width: int) -> Recovery | None:
        """Reads `recovery.*` of a golden of `tokens` image tokens; None where it holds nothing of it.

        Kept tokens are then rows as they entered the cut. BundleError where a part is missing or does not fit.
        """
        if not any(recovery_key(part) in golden for part in RECOVERY_PARTS):
            return None
        shapes = dict(zip(RECOVERY_PARTS, ((tokens, width), (tokens, tokens), (1,), (1,)), strict=True))
        found = {}
        for name, shape in shapes.items():
            key = recovery_key(name)
            if key not in golden:
                raise BundleError(f"the golden lacks {key}, which near ties are judged by; export again")
            if golden[key].shape != shape or not np.isfinite(golden[key]).all():
                raise BundleError(
                    f"the golden's {key} must hold finite numbers of the shape {list(shape)}, "
                    f"it has {list(golden[key].shape)}; export again"
                )
            found[name] = golden[key].astype(np.float64)
        return cls(
            hidden=found["hidden"],
            similarity=found["similarity"],
            share=float(found["share"][0]),
            least_share=float(found["least_share"][0]),
        )

    def standing(self, kept: np.ndarray) -> Standing:
        """Sends each dropped token to its most similar kept one, the first on ties: (K,) ascending -> Standing."""
        to_kept = self.similarity[:, kept]
        slot = to_kept.argmax(axis=1)
        best = np.take_along_axis(to_kept, slot[:, None], axis=1)[:, 0]
        np.put_along_axis(to_kept, slot[:, None], -np.inf, axis=1)
        margin = best - to_kept.max(axis=1) if len(kept) > 1 else np.full(len(best), np.inf)
        slot[kept], margin[kept] = -1, np.inf
        return Standing(slot, margin)

    def rows(self, kept: np.ndarray, slot: np.ndarray) -> np.ndarray:
        """What the kept tokens hold if dropped token i went to `slot[i]`: (K,), (N,) -> (K, D)."""
        return self._some_rows(kept, slot, range(len(kept)))

    def decided_as(
        self, kept: np.ndarray, got: np.ndarray, outside: np.ndarray, *, resolution: float
    ) -> tuple[np.ndarray, tuple[Moved, ...]]:
        """Finds the decisions of near ties that bring the rows `outside` nearest to `got` (K, D).

        Only tokens that are less than `resolution` more similar to the desktop's choice may go elsewhere, and only to
        or from a row outside. Gives the rows (K, D) of those decisions and the tokens that moved.
        """
        standing = self.standing(kept)
        slot = standing.slot.copy()
        near = [
            (token, *(int(other) for other in self._candidates(token, kept, slot, resolution) if other != slot[token]))
            for token in np.flatnonzero(standing.margin < resolution).tolist()
        ]
        rows = self.rows(kept, slot)
        error = np.square(rows - got).sum(axis=1)
        suspects = set(np.flatnonzero(outside).tolist())
        for _ in range(_SWEEPS):
            before = slot.copy()
            for token, *others in near:
                for other in {*others, int(standing.slot[token])} - {int(slot[token])}:
                    both = [int(slot[token]), other]
                    if not suspects & set(both):
                        continue
                    tried = slot.copy()
                    tried[token] = other
                    two = self._some_rows(kept, tried, both)
                    new = np.square(two - got[both]).sum(axis=1)
                    if new.sum() < error[both].sum():
                        slot, rows[both], error[both] = tried, two, new
            if np.array_equal(before, slot):
                break
        moved = tuple(
            Moved(
                token=token,
                desktop=int(kept[standing.slot[token]]),
                engine=int(kept[slot[token]]),
                margin=float(
                    self.similarity[token, kept[standing.slot[token]]] - self.similarity[token, kept[slot[token]]]
                ),
            )
            for token in np.flatnonzero(slot != standing.slot).tolist()
        )
        return rows, moved

    def _candidates(self, token: int, kept: np.ndarray, slot: np.ndarray, resolution: float) -> np.ndarray:
        """Slots of the kept tokens that are less than `resolution` less similar than the most similar one."""
        to_kept = self.similarity[token, kept]
        return np.asarray(np.flatnonzero(to_kept[slot[token]] - to_kept < resolution))

    def _some_rows(self, kept: np.ndarray, slot: np.ndarray, which: Sequence[int]) -> np.ndarray:
        """The rows of some kept tokens, by their slots: (K,), (N,) -> (len(which), D)."""
        rows: np.ndarray = self.hidden[kept[list(which)]]
        for row, one in zip(rows, which, strict=True):
            members = np.flatnonzero(slot == one)
            weight = self.similarity[members, kept[one]]
            if weight.sum() > self.least_share * np.abs(weight).sum():
                mean = weight @ self.hidden[members] / weight.sum()
                row[:] = (1.0 - self.share) * row + self.share * mean
        return rows
