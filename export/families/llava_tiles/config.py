"""The sizes of a LLaVA-NeXT or LLaVA-OneVision model for one size of image."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from export.families.llava.config import Kind, LlavaGeometry
from export.settings import shown, without_nulls
from runtime.errors import CheckpointError, RequestError
from runtime.tiling import Tiling, lay_out

_MOST_PIXELS = 2**13
_ASPECT = re.compile(r"anyres_max_([1-9][0-9]{0,3})")


@dataclass(frozen=True)
class TiledGeometry(LlavaGeometry):
    """All sizes of one model whose photos lie in tiles behind a view of the whole; without `tiling` that is all.

    `pinpoints` are the sizes (height, width) in pixels that all tiles together may have; tokens of more than
    `most_tiles` are averaged.
    """

    pinpoints: tuple[tuple[int, int], ...]
    most_tiles: int | None
    tiling: Tiling | None
    newline: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tiling is not None and self.text.max_positions <= self.image_tokens:
            raise RequestError(
                f"photos of this image_size have {self.image_tokens} image tokens, and the model knows "
                f"{self.text.max_positions} positions; take a smaller one"
            )
        super().__post_init__()

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens of the tiles as (rows, columns), or of the whole photo where that is all."""
        return self.vision.grid if self.tiling is None else self.tiling.grid

    @property
    def overview(self) -> tuple[int, int] | None:
        """The grid of the view of the whole photo in front of the tiles."""
        return None if self.tiling is None else self.vision.grid

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of all image tokens, in their order."""
        return (self.overview, self.grid) if self.overview else (self.grid,)

    @property
    def image_tokens(self) -> int:
        """Image tokens before pruning."""
        return sum(math.prod(grid) for grid in self.grids)

    @property
    def pixel_values(self) -> tuple[int, ...]:
        """(views, channels, height, width): the whole photo first, then its tiles row by row."""
        views = 1 if self.tiling is None else 1 + self.tiling.count
        return views, *super().pixel_values[1:]

    @classmethod
    def at(cls, config: Mapping[str, Any], kind: Kind, image_size: tuple[int, int] | None) -> TiledGeometry:
        """The geometry that a config.json describes, for photos of (height, width) pixels, or for views of the whole.

        CheckpointError when it is no file of that kind, or contradicts itself; RequestError for a size of which no
        token is left.
        """
        top = {**kind.top, **without_nulls(config)}
        whole = cls.from_config(
            config, kind, pinpoints=_pinpoints(top["image_grid_pinpoints"]), most_tiles=None, tiling=None
        )
        tile = whole.vision.image_size
        for pinpoint in whole.pinpoints:
            if any(edge % tile for edge in pinpoint):
                raise CheckpointError(
                    f"config.json: image_grid_pinpoints holds {list(pinpoint)}, which are no tiles of {tile} pixels; "
                    "download the file again"
                )
        most = None
        if "vision_aspect_ratio" in kind.top:
            said = top["vision_aspect_ratio"]
            found = _ASPECT.fullmatch(said) if isinstance(said, str) else None
            if found is None:
                raise CheckpointError(
                    f"config.json: vision_aspect_ratio={shown(said)}; supported: anyres_max_9 and other numbers"
                )
            most = int(found[1])
        whole = replace(whole, most_tiles=most)
        if image_size is None:
            return whole
        tiling = lay_out(image_size, whole.pinpoints, tile=tile, side=whole.vision.grid[0], most=most)
        if min(tiling.grid) < 1:
            raise RequestError(
                f"image_size={image_size[0]}x{image_size[1]} leaves no row or no column of image tokens; take one that "
                "is less long"
            )
        return replace(whole, tiling=tiling)


def _pinpoints(given: object) -> tuple[tuple[int, int], ...]:
    pairs = given if isinstance(given, list) else []
    sound = all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(edge) is int and 1 <= edge <= _MOST_PIXELS for edge in pair)
        for pair in pairs
    )
    if not pairs or not sound:
        raise CheckpointError(
            f"config.json: image_grid_pinpoints must be a list of heights and widths in pixels, got {shown(given)}; "
            "download the file again"
        )
    return tuple((height, width) for height, width in pairs)
