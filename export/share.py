"""A share of a photo's image tokens, such as `11%`, where a number of them may be named, too."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from runtime.errors import RequestError

_ALLOWED = "a share lies above 0% and at most at 100%: write 11% or 12.5%, say, or a number of image tokens"


@dataclass(frozen=True)
class Share:
    """A share above 0 and at most 1, exact: halves are not left to floating point."""

    value: Fraction

    def __post_init__(self) -> None:
        if not 0 < self.value <= 1:
            raise ValueError(f"value={self.value} must lie above 0 and at most at 1")

    def of(self, tokens: int) -> int:
        """Its number of so many tokens: the nearest whole one, the larger of two, and at least 1."""
        return max(1, math.floor(self.value * tokens + Fraction(1, 2)))


def is_share(text: str) -> bool:
    """Whether a word means a share rather than a number."""
    return text.endswith("%")


def read_share(text: str) -> Share:
    """Reads `11%` or `12.5%`; RequestError for anything else."""
    found = re.fullmatch(r"([+-]?[0-9]{1,18}(?:\.[0-9]{1,18})?)%", text)
    if found is None:
        raise RequestError(f"keep={text[:20]!r} is not a share of the image tokens; {_ALLOWED}")
    value = Fraction(found[1]) / 100
    if not 0 < value <= 1:
        raise RequestError(f"keep={text} is not a share that can be kept; {_ALLOWED}")
    return Share(value)
