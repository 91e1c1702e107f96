"""The image tokens that a bundle keeps of a photo, drawn over it: as a picture file, and in the cells of a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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


def check_picture(path: Path) -> None:
    """Raises RequestError for a name that is no picture's, OutputError for a folder that is not there."""
    if path.suffix.lower() not in PICTURES:
        raise RequestError(f"draw={str(path)!r} must end in {', '.join(PICTURES)}: by that the format is chosen")
    if not path.parent.is_dir():
        raise OutputError(f"{path} cannot be written: {path.parent} is no folder")


def draw_kept(photo: np.ndarray, info: ImageInfo, grid: tuple[int, int], kept: Sequence[int]) -> np.ndarray:
    """What the model looks at of `photo` uint8 (H, W, 3), with the patches veiled that are not `kept`: uint8 (h, w, 3).

    `grid` is (rows, columns) of the image tokens, which `kept` numbers from 0, row by row.
    """
    shown = enlarged_view(photo, info)
    rows, columns = _owners(shown.shape[0], grid[0]), _owners(shown.shape[1], grid[1])
    stays = _stays(grid, kept)[rows[:, None], columns[None, :], None]
    return np.where(stays, shown, _veiled(shown))


def save_kept(path: Path, photo: np.ndarray, info: ImageInfo, grid: tuple[int, int], kept: Sequence[int]) -> None:
    """Writes the picture of `draw_kept`, in the format that the name ends in. Raises OutputError."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(draw_kept(photo, info, grid, kept)).save(data, PICTURES[path.suffix.lower()], quality=85)
    try:
        path.write_bytes(data.getvalue())
    except OSError as err:
        raise OutputError(f"{path} cannot be written: {err.strerror or err}; choose another place") from err


def kept_cells(photo: np.ndarray, info: ImageInfo, grid: tuple[int, int], kept: Sequence[int]) -> Text:
    """The same in small: a terminal's cell shows two patches, one above the other, each in its mean colour."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    seen = view(photo, info).astype(np.float32)
    rows, columns = _owners(seen.shape[0], grid[0]), _owners(seen.shape[1], grid[1])
    colours = np.zeros((*grid, 3), np.float32)
    np.add.at(colours, (rows[:, None], columns[None, :]), seen)
    colours /= (np.bincount(rows, minlength=grid[0])[:, None] * np.bincount(columns, minlength=grid[1]))[..., None]
    shown = np.where(_stays(grid, kept)[..., None], colours, _veiled(colours)).astype(int)
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


def _stays(grid: tuple[int, int], kept: Sequence[int]) -> np.ndarray:
    stays = np.zeros(grid[0] * grid[1], bool)
    stays[list(kept)] = True
    return stays.reshape(grid)


def _veiled(pixels: np.ndarray) -> np.ndarray:
    return (_LEFT * pixels + (1 - _LEFT) * _VEIL).astype(pixels.dtype)
