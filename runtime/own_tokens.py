"""How many image tokens a model's own processor makes of a photo, for models that take photos of any size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from runtime.names import plural
from runtime.tiling import lay_out

if TYPE_CHECKING:
    from runtime.bundle import ImageInfo, PixelsInfo


class OwnTokens(NamedTuple):
    """Image tokens of a photo, and tokens that only end a row of them, which come on top."""

    tokens: int
    row_ends: int = 0


def own_tokens(image: ImageInfo, photo: tuple[int, int]) -> OwnTokens | None:
    """Counts those of a photo of (height, width) pixels; None where the model takes one size, or none was told."""
    if image.pixels is not None:
        rows, columns = _token_grid(photo, image.pixels)
        return OwnTokens(rows * columns)
    if image.pinpoints is not None:
        told = image.pinpoints
        rows, columns = lay_out(photo, told.sizes, tile=told.tile, side=told.side, most=told.most).grid
        return OwnTokens(told.side**2 + rows * columns, rows)
    return None


def own_words(image: ImageInfo, photo: tuple[int, int] | None) -> str:
    """Says the same in words; nothing where there is nothing to say."""
    told = None if photo is None else own_tokens(image, photo)
    if photo is None or told is None:
        return ""
    ends = f" and {plural(told.row_ends, 'row end')}" if told.row_ends else ""
    return f"{plural(told.tokens, 'image token')}{ends} by the model's own processor for {photo[1]} x {photo[0]} pixels"


def _token_grid(photo: tuple[int, int], told: PixelsInfo) -> tuple[int, int]:
    """Rows and columns of tokens: the edges rounded to whole tokens, then scaled into the limits, shape kept.

    As `smart_resize` of transformers' Qwen2-VL: down to fit below the most pixels, up to fit above the least.
    """
    height, width = photo
    rows, columns = round(height / told.token), round(width / told.token)
    pixels = rows * columns * told.token**2
    if pixels > told.most:
        scale = math.sqrt(height * width / told.most)
        rows, columns = (max(1, math.floor(edge / scale / told.token)) for edge in photo)
    elif pixels < told.least:
        scale = math.sqrt(told.least / (height * width))
        rows, columns = (math.ceil(edge * scale / told.token) for edge in photo)
    return rows, columns
