"""The picture of the kept tokens: kept patches as they are, dropped ones dark, on a terminal a cell for two of them."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.color import Color
from rich.style import Style

from runtime.bundle import ImageInfo, PruneInfo
from runtime.errors import OutputError
from runtime.image import enlarged_view, load_photo
from runtime.kept_picture import draw_kept, kept_cells, save_kept

# Three rows of four patches, 8 pixels each and two pixels over, as where a patch size does not divide an image.
PRUNE = PruneInfo(
    cut=2, image_tokens=12, keep=3, grid=(3, 4), pruned=True, method="uniform", settings={}, arithmetic="float32"
)
INFO = ImageInfo(
    size=(26, 34), resize_shortest=26, rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), do_center_crop=False
)
PHOTO = np.full((26, 34, 3), (250, 120, 60), np.uint8)


def test_kept_patches_stay_and_dropped_ones_are_dark() -> None:
    shown = enlarged_view(PHOTO, INFO)
    drawn = draw_kept(enlarged_view(PHOTO, INFO), PRUNE, (0, 6, 11))
    assert drawn.shape == shown.shape
    same = (drawn == shown).all(axis=-1)
    height, width = same.shape
    for index in range(12):
        row, column = divmod(index, 4)
        inside = np.s_[
            int((row + 0.2) * height / 3) : int((row + 0.8) * height / 3),
            int((column + 0.2) * width / 4) : int((column + 0.8) * width / 4),
        ]
        assert same[inside].all() == (index in (0, 6, 11)), index
        assert index in (0, 6, 11) or not same[inside].any()
    assert drawn[~same].mean() < shown[~same].mean() / 2
    assert (draw_kept(enlarged_view(PHOTO, INFO), PRUNE, range(12)) == shown).all()


def test_a_token_of_an_overview_covers_its_part_of_the_photo() -> None:
    prune = msgspec.structs.replace(PRUNE, image_tokens=16, overview=(2, 2))
    shown = enlarged_view(PHOTO, INFO)
    drawn = draw_kept(
        enlarged_view(PHOTO, INFO), prune, (1, 4 + 8)
    )  # above on the right; and below on the left, of the grid
    same = (drawn == shown).all(axis=-1)
    height, width = same.shape
    half, third = height / 2, 2 * height / 3
    expected = np.zeros_like(same)
    expected[: math.ceil(half), math.ceil(width / 2) :] = True
    expected[math.ceil(third) :, : math.ceil(width / 4)] = True
    assert (same == expected).all()
    first, second = kept_cells(PHOTO, INFO, prune, (1,)).split("\n")
    bright = Color.from_rgb(250, 120, 60)
    cells = [(span.style.color, span.style.bgcolor) for span in first.spans if isinstance(span.style, Style)]
    assert [(upper == bright, lower == bright) for upper, lower in cells] == [(False, False)] * 2 + [(True, True)] * 2
    assert all(span.style.color != bright for span in second.spans if isinstance(span.style, Style))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_it_is_written_as_it_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"kept{suffix}"
    save_kept(path, PHOTO, INFO, PRUNE, (0, 6, 11))
    close = load_photo(path).astype(int) - draw_kept(enlarged_view(PHOTO, INFO), PRUNE, (0, 6, 11))
    assert np.abs(close).mean() < 8  # JPEG and WebP lose some
    with pytest.raises(OutputError, match="cannot be written"):
        save_kept(tmp_path / "nowhere" / path.name, PHOTO, INFO, PRUNE, ())


def test_a_terminal_shows_two_patches_in_a_cell() -> None:
    first, second = kept_cells(PHOTO, INFO, PRUNE, (0, 6, 11)).split("\n")
    assert (first.plain, second.plain) == ("▀▀▀▀", "▀▀▀▀")
    styles = [span.style for line in (first, second) for span in line.spans]
    assert all(isinstance(style, Style) for style in styles)
    upper = [style.color for style in styles if isinstance(style, Style)]
    lower = [style.bgcolor for style in styles if isinstance(style, Style)]
    patches = [*upper[:4], *lower[:4], *upper[4:]]
    bright = Color.from_rgb(250, 120, 60)
    assert [index for index, colour in enumerate(patches) if colour == bright] == [0, 6, 11]
    assert lower[4:] == [None] * 4  # below the last row
