"""How a photo of one size lies in tiles, and which tokens of these show it: the same for every photo of that size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Image tokens may be so many times as many as the most tiles have before they are averaged.
_SLACK = 1.1


@dataclass(frozen=True)
class Tiling:
    """A photo in tiles, (rows, columns) of all.

    The photo is squeezed into `resize` (height, width) in pixels, in the middle of `tiles`. Of their tokens, without
    regard to where one tile ends, those from `corner` on are `seen`, the others show nothing but padding. They are
    averaged to `grid` where that has fewer.
    """

    resize: tuple[int, int]
    tiles: tuple[int, int]
    corner: tuple[int, int]
    seen: tuple[int, int]
    grid: tuple[int, int]

    @property
    def count(self) -> int:
        """Tiles."""
        return self.tiles[0] * self.tiles[1]


def lay_out(
    photo: tuple[int, int], pinpoints: Sequence[tuple[int, int]], *, tile: int, side: int, most: int | None
) -> Tiling:
    """Lays out a photo (height, width) as transformers does, at the best of `pinpoints`, (height, width) of all tiles.

    A tile has `tile` pixels and `side` tokens an edge. With `most`, tokens of more tiles than that are averaged.
    Of a photo that is too long for them, no row or no column of tokens is left.
    """
    height, width = photo

    def worth(pinpoint: tuple[int, int]) -> tuple[int, int]:
        """Pixels of the photo that it shows, and then how few are wasted."""
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        return shown, shown - pinpoint[0] * pinpoint[1]

    room = max(pinpoints, key=worth)  # the first of equals
    by_height, by_width = room[0] / height, room[1] / width
    if by_width < by_height:
        resize = min(math.ceil(height * by_width), room[0]), room[1]
    else:
        resize = room[0], min(math.ceil(width * by_height), room[1])
    tiles = room[0] // tile, room[1] // tile
    rows, columns = tiles[0] * side, tiles[1] * side
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    seen = rows - 2 * top, columns - 2 * left
    grid = seen
    if most is not None:
        ratio = math.sqrt(seen[0] * seen[1] / (most * side**2))
        if ratio > _SLACK:
            grid = int(seen[0] // ratio), int(seen[1] // ratio)
    return Tiling(resize=resize, tiles=tiles, corner=(top, left), seen=seen, grid=grid)
