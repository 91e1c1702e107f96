"""Image tokens that are kept of a photo, drawn over it: in pixels, as a picture file, in the cells of a terminal."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from runtime.errors import OutputError, RequestError
from runtime.image import enlarged_view, view

if TYPE_CHECKING:
    from rich.text import Text

    from runtime.bundle import ImageInfo

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# What a dropped patch is mixed with, and how much of it is left.
_VEIL = np.array([24, 24, 32], np.float32)
_LEFT = 0.25
_ROUNDING = 1e-6  # of a pixel


def check_picture(path: Path) -> None:
    """Raises RequestError for a name that is no picture's, OutputError for a folder that is not there."""
    if path.suffix.lower() not in PICTURES:
        raise RequestError(f"draw={str(path)!r} must end in {', '.join(PICTURES)}: by that the format is chosen")
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: {path.parent} is no folder")


class Grids(Protocol):
    """Rows and columns of image tokens, and of those of a view of the whole photo in front of them, if there is one."""

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def overview(self) -> tuple[int, int] | None: ...


def token_shapes(grids: Grids) -> list[tuple[float, float, float, float]]:
    """Where each image token lies in the picture: x, y, width and height, in tokens of the grid."""
    rows, columns = grids.grid
    shapes: list[tuple[float, float, float, float]] = []
    if grids.overview:
        height, width = rows / grids.overview[0], columns / grids.overview[1]
        shapes = [
            (x * width, y * height, width, height) for y in range(grids.overview[0]) for x in range(grids.overview[1])
        ]
    return shapes + [(x, y, 1, 1) for y in range(rows) for x in range(columns)]


def draw_kept(shown: np.ndarray, grids: Grids, kept: Sequence[int]) -> np.ndarray:
    """What the model looks at, uint8 (h, w, 3), with the patches veiled that are not `kept`: uint8 (h, w, 3).

    `kept` are numbers of image tokens; those of an overview cover all patches that they show.
    """
    return np.where(_stays(shown.shape[:2], grids, kept)[..., None], shown, _veiled(shown))


def save_kept(path: Path, photo: np.ndarray, info: ImageInfo, grids: Grids, kept: Sequence[int]) -> None:
    """Writes `photo` uint8 (H, W, 3) as `draw_kept` has it, in the format that the name ends in. Raises OutputError."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(draw_kept(enlarged_view(photo, info), grids, kept)).save(
        data, PICTURES[path.suffix.lower()], quality=85
    )
    try:
        path.write_bytes(data.getvalue())
    except OSError as err:
        raise OutputError(f"{path} cannot be written: {err.strerror or err}; choose another place") from err


def kept_cells(photo: np.ndarray, info: ImageInfo, grids: Grids, kept: Sequence[int]) -> Text:
    """The same in small: a terminal's cell shows two patches, one above the other, each in its mean colour."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    seen, grid = view(photo, info).astype(np.float32), grids.grid
    rows, columns = _owners(seen.shape[0], grid[0]), _owners(seen.shape[1], grid[1])
    colours = np.zeros((*grid, 3), np.float32)
    np.add.at(colours, (rows[:, None], columns[None, :]), seen)
    colours /= (np.bincount(rows, minlength=grid[0])[:, None] * np.bincount(columns, minlength=grid[1]))[..., None]
    shown = np.where(_stays(grid, grids, kept)[..., None], colours, _veiled(colours)).astype(int)
    drawn = Text()
    for top in range(0, grid[0], 2):
        for column in range(grid[1]):
            upper, *lower = (Color.from_rgb(*shown[row, column]) for row in range(top, min(top + 2, grid[0])))
            drawn.append("▀", Style(color=upper, bgcolor=lower[0] if lower else None))
        drawn.append("\n")
    return drawn


def _owners(pixels: int, patches: int) -> np.ndarray:
    """(pixels,): the patch that each pixel of an edge belongs to."""
    return np.arange(pixels) * patches // pixels


def _stays(size: tuple[int, ...], grids: Grids, kept: Sequence[int]) -> np.ndarray:
    """Where a picture of `size` (height, width) shows a kept token: (height, width) bool."""
    stays = np.zeros(size, bool)
    down, across = size[0] / grids.grid[0], size[1] / grids.grid[1]
    shapes = token_shapes(grids)
    for x, y, width, height in (shapes[index] for index in kept):
        # What begins inside belongs to it, as in _owners; a shape's edge is exact but for its last bits.
        top, bottom, left, right = (
            math.ceil(edge - _ROUNDING) for edge in (y * down, (y + height) * down, x * across, (x + width) * across)
        )
        stays[top:bottom, left:right] = True
    return stays


def _veiled(pixels: np.ndarray) -> np.ndarray:
    return (_LEFT * pixels + (1 - _LEFT) * _VEIL).astype(pixels.dtype)
