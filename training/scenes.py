"""Scenes of coloured shapes and printed text over photos, with all that is in them: drawn from a seed, by PIL."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

PATCH = 14
GRID = 24
SIDE = PATCH * GRID

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
FILLS = ("plain", "striped", "dotted")
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
WORDS = (
    "stop", "exit", "open", "milk", "bread", "sale", "taxi", "bank", "post", "hotel",
    "cafe", "shop", "park", "zoo", "jazz", "news", "fish", "lunch", "menu", "keys",
    "gold", "velvet", "box", "quiz",
)  # fmt: skip

_RGB = {
    "red": (205, 28, 32),
    "green": (30, 150, 50),
    "blue": (30, 70, 205),
    "yellow": (242, 222, 30),
    "orange": (245, 135, 15),
    "purple": (135, 45, 170),
    "white": (245, 245, 245),
    "black": (16, 16, 16),
}
# Pairs of shape and colour that training never shows; each shape and each colour is seen in others.
HELD_OUT_PAIRS = frozenset(
    {
        ("circle", "purple"),
        ("square", "orange"),
        ("triangle", "red"),
        ("star", "blue"),
        ("cross", "yellow"),
        ("ring", "green"),
        ("circle", "black"),
        ("star", "white"),
    }
)
_FONTS = (
    "DejaVuSans-Bold", "DejaVuSans", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique", "DejaVuSerif",
    "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta", "cmtt10", "cmb10",
)  # fmt: skip
HELD_OUT_FONTS = ("DejaVuSansMono-Bold", "DejaVuSerif-BoldItalic", "cmss10", "STIXGeneralItalic")
_PHOTOS = (
    "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg", "brick.png",
    "grass.png", "gravel.png", "coins.png", "china.jpg", "retina.jpg",
)  # fmt: skip
HELD_OUT_PHOTOS = ("astronaut.png", "flower.jpg", "motorcycle_right.png", "ihc.png")


@dataclass(frozen=True)
class Thing:
    """A coloured shape: its centre and half its size, in pixels of the whole picture."""

    shape: str
    colour: str
    fill: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Sign:
    """A printed word or number, in capitals, and the box it fills, in pixels of the whole picture."""

    text: str
    box: tuple[float, float, float, float]

    @property
    def is_number(self) -> bool:
        return self.text.isdigit()


@dataclass(frozen=True)
class Scene:
    """A picture, uint8 (H, W, 3), what is in it, and a label for each patch.

    Attributes:
        corner: row and column of the picture's first patch in the grid of 24 x 24; (0, 0) for a whole picture.
        labels: (patches down, patches across, 5) uint8: shape, colour, fill, glyph, centre of a thing; 0 is none.
    """

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]
    signs: tuple[Sign, ...]
    corner: tuple[int, int]
    labels: NDArray[np.uint8]


LABELS = (len(SHAPES) + 1, len(COLOURS) + 1, len(FILLS) + 1, len(GLYPHS) + 1, 2)


@functools.cache
def _photo(name: str) -> Image.Image:
    import skimage
    import sklearn

    folders = (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images")
    for folder in folders:
        if (folder / name).is_file():
            return Image.open(folder / name).convert("RGB")
    raise FileNotFoundError(f"{name} is in neither scikit-image nor scikit-learn; install the `training` extra")


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def _background(rng: np.random.Generator, side: int, held_out: bool) -> Image.Image:
    kind = rng.random()
    if kind < 0.6:
        names = HELD_OUT_PHOTOS if held_out else _PHOTOS
        photo = _photo(names[rng.integers(len(names))])
        shortest = min(photo.size)
        crop = int(rng.uniform(0.3, 1.0) * shortest)
        left = int(rng.integers(photo.width - crop + 1))
        top = int(rng.integers(photo.height - crop + 1))
        picture = photo.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, left + crop, top + crop))
        if rng.random() < 0.5:
            picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 3))))
        return picture
    if kind < 0.75:
        return Image.new("RGB", (side, side), tuple(int(c) for c in rng.integers(40, 230, 3)))
    one, two = (rng.integers(40, 230, 3) for _ in range(2))
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind < 0.88:
        share = (along - along.min()) / (along.max() - along.min())
    else:
        share = 0.5 + 0.5 * np.sin(along * (2 * math.pi / rng.uniform(8, 40)))
        two = one + np.clip(two.astype(np.int64) - one, -45, 45)
    values = one + (two - one) * share[..., None]
    if rng.random() < 0.5:
        values = values + rng.normal(0, rng.uniform(2, 14), (side, side, 1))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _clutter(rng: np.random.Generator, draw: ImageDraw.ImageDraw, side: int) -> None:
    """Lines and specks in any colour, under everything else."""
    for _ in range(int(rng.integers(0, 1 + side // 24))):
        x, y = rng.uniform(0, side, 2)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        if rng.random() < 0.6:
            dx, dy = rng.normal(0, 30, 2)
            draw.line((x, y, x + dx, y + dy), fill=colour, width=int(rng.integers(1, 3)))
        else:
            r = rng.uniform(0.7, 2.2)
            draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)


def _outline(shape: str, x: float, y: float, r: float, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape that has corners."""
    radii: list[float]
    angles: list[float]
    if shape == "square":
        radii, angles = [r * 1.15] * 4, [45 + 90 * i for i in range(4)]
    elif shape == "triangle":
        radii, angles = [r * 1.2] * 3, [-90 + 120 * i for i in range(3)]
    elif shape == "star":
        radii, angles = [r * 1.2 if i % 2 == 0 else r * 0.48 for i in range(10)], [-90 + 36 * i for i in range(10)]
    else:
        t = 0.34 * r
        flat = [
            (-t, -r),
            (t, -r),
            (t, -t),
            (r, -t),
            (r, t),
            (t, t),
            (t, r),
            (-t, r),
            (-t, t),
            (-r, t),
            (-r, -t),
            (-t, -t),
        ]
        radii = [math.hypot(a, b) for a, b in flat]
        angles = [math.degrees(math.atan2(b, a)) for a, b in flat]
    return [
        (x + q * math.cos(math.radians(a + turn)), y + q * math.sin(math.radians(a + turn)))
        for q, a in zip(radii, angles, strict=True)
    ]


_TWICE = 2  # drawn at twice the size, so that edges are smooth


def _draw_thing(rng: np.random.Generator, picture: Image.Image, thing: Thing, left: float, top: float) -> Any:
    """Draws a thing and returns the share of each pixel of its box that it covers, and the box's first pixel."""
    r = thing.radius * 1.25 + 1
    x0, y0 = math.floor(thing.x - left - r), math.floor(thing.y - top - r)
    size = math.ceil(2 * r) + 2
    mask = Image.new("L", (_TWICE * size, _TWICE * size))
    draw = ImageDraw.Draw(mask)
    x, y, s = (thing.x - left - x0) * _TWICE, (thing.y - top - y0) * _TWICE, thing.radius * _TWICE
    turn = float(rng.uniform(-12, 12))
    if thing.shape in ("circle", "ring"):
        draw.ellipse((x - s, y - s, x + s, y + s), fill=255)
        if thing.shape == "ring":
            inner = 0.52 * s
            draw.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
    else:
        draw.polygon(_outline(thing.shape, x, y, s, turn), fill=255)
    mask = mask.resize((size, size), Image.Resampling.BOX)
    base = np.array(_RGB[thing.colour], dtype=np.float32)
    base = np.clip(base + rng.normal(0, 7, 3), 0, 255)
    body = np.broadcast_to(base, (size, size, 3)).copy()
    if thing.fill != "plain":
        # The pattern is the shape's own colour, much lighter or darker, so that the colour's name stays true.
        other = base * 0.55 + (115 if base.mean() < 110 else 0)
        rows, columns = np.mgrid[0:size, 0:size].astype(np.float32)
        period = float(rng.uniform(6.0, 8.0))
        if thing.fill == "striped":
            angle = float(rng.choice([0.0, 45.0, 90.0, 135.0]))
            along = columns * math.cos(math.radians(angle)) + rows * math.sin(math.radians(angle))
            inside = (along % period) < 0.45 * period
        else:
            inside = np.hypot(rows % period - period / 2, columns % period - period / 2) < 0.3 * period
        body[inside] = other
    picture.paste(Image.fromarray(body.astype(np.uint8)), (x0, y0), mask)
    return np.asarray(mask, dtype=np.float32) / 255, x0, y0


def _draw_sign(rng: np.random.Generator, picture: Image.Image, text: str, font: Any, x: float, y: float) -> list[Any]:
    """Prints text on a plate, or straight on the picture with an edge; returns the box of each glyph."""
    draw = ImageDraw.Draw(picture)
    gap = float(rng.uniform(0.5, 2.5))
    boxes, at = [], x
    dark = bool(rng.random() < 0.5)
    ink = tuple(int(c) for c in (rng.integers(0, 60, 3) if dark else rng.integers(200, 256, 3)))
    paper = tuple(int(c) for c in (rng.integers(180, 256, 3) if dark else rng.integers(0, 90, 3)))
    for letter in text:
        x0, y0, x1, y1 = font.getbbox(letter)
        boxes.append((at, y, at + x1 - x0, y + y1 - y0, at - x0, y - y0))
        at += x1 - x0 + gap
    x1, y1 = max(b[2] for b in boxes), max(b[3] for b in boxes)
    plate = rng.random() < 0.75
    if plate:
        pad = float(rng.uniform(2, 6))
        draw.rectangle((x - pad, y - pad, x1 + pad, y1 + pad), fill=paper)
    for letter, box in zip(text, boxes, strict=True):
        if plate:
            draw.text((box[4], box[5]), letter, font=font, fill=ink)
        else:
            draw.text((box[4], box[5]), letter, font=font, fill=ink, stroke_width=1, stroke_fill=paper)
    return boxes


def sign_size(text: str, font: Any) -> tuple[float, float]:
    """Width and height in pixels that printed text takes at most."""
    boxes = [font.getbbox(letter) for letter in text]
    return sum(b[2] - b[0] + 2.5 for b in boxes), float(max(b[3] - b[1] for b in boxes))


def number_of(rng: np.random.Generator) -> str:
    """A number of one to three digits."""
    digits = int(rng.integers(1, 4))
    return str(int(rng.integers(10 ** (digits - 1) if digits > 1 else 0, 10**digits)))


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How full scenes are.

    Attributes:
        things: least and most shapes in a picture.
        signs: least and most printed texts.
        radius: least and most half size of a shape, in pixels.
        height: least and most height of type, in pixels.
        letters: share of signs that are letters at random, which nobody asks about.
        same: chance that a thing takes over the shape, or the colour, of one before it; that makes counts.
    """

    things: tuple[int, int] = (2, 7)
    signs: tuple[int, int] = (0, 2)
    radius: tuple[float, float] = (9, 34)
    height: tuple[int, int] = (18, 42)
    letters: float = 0.0
    same: float = 0.45


def make_scene(seed: tuple[int, ...], mixture: Mixture, *, patches: int = GRID, held_out: bool = False) -> Scene:
    """Draws the scene of a seed: a whole picture, or a window of `patches` by `patches` somewhere in one."""
    rng = np.random.default_rng(seed)
    side = patches * PATCH
    corner = (int(rng.integers(GRID - patches + 1)), int(rng.integers(GRID - patches + 1)))
    left, top = corner[1] * PATCH, corner[0] * PATCH
    picture = _background(rng, side, held_out)
    _clutter(rng, ImageDraw.Draw(picture), side)
    labels = np.zeros((patches, patches, 5), dtype=np.uint8)
    best = np.full((patches, patches), 0.1, dtype=np.float32)
    taken: list[tuple[float, float, float, float]] = []

    def free(width: float, height: float, margin: float) -> tuple[float, float] | None:
        if width + 2 * margin >= side or height + 2 * margin >= side:
            return None
        for _ in range(12):
            x = float(rng.uniform(margin, side - margin - width))
            y = float(rng.uniform(margin, side - margin - height))
            if all(x + width + 5 < a or c + 5 < x or y + height + 5 < b or d + 5 < y for a, b, c, d in taken):
                taken.append((x, y, x + width, y + height))
                return x, y
        return None

    fonts = HELD_OUT_FONTS if held_out else _FONTS
    signs: list[Sign] = []
    for _ in range(int(rng.integers(mixture.signs[0], mixture.signs[1] + 1))):
        font = _font(fonts[rng.integers(len(fonts))], int(rng.integers(mixture.height[0], mixture.height[1] + 1)))
        if rng.random() < mixture.letters:
            text = "".join(GLYPHS[i] for i in rng.integers(len(GLYPHS), size=int(rng.integers(1, 6))))
        elif rng.random() < 0.5:
            text = WORDS[rng.integers(len(WORDS))].upper()
        else:
            text = number_of(rng)
        if mixture.letters == 0 and any(text.isdigit() == sign.is_number for sign in signs):
            continue  # one word and one number at most, so that a question means one of them
        width, height = sign_size(text, font)
        place = free(width, height, 7)
        if place is None:
            continue
        boxes = _draw_sign(rng, picture, text, font, *place)
        for letter, (x0, y0, x1, y1, _, _) in zip(text, boxes, strict=True):
            _label_box(labels, best, GLYPHS.index(letter) + 1, x0, y0, x1, y1)
        signs.append(Sign(text, (place[0] + left, place[1] + top, boxes[-1][2] + left, place[1] + top + height)))

    things: list[Thing] = []
    for _ in range(int(rng.integers(mixture.things[0], mixture.things[1] + 1))):
        # Sizes are even on a logarithmic scale: small ones matter.
        radius = float(np.exp(rng.uniform(*np.log(mixture.radius))))
        shape, colour = SHAPES[rng.integers(len(SHAPES))], COLOURS[rng.integers(len(COLOURS))]
        if things and rng.random() < mixture.same:
            before = things[rng.integers(len(things))]
            if rng.random() < 0.65:
                shape = before.shape
            else:
                colour = before.colour
        if held_out and rng.random() < 0.3:
            pairs = sorted(HELD_OUT_PAIRS)
            shape, colour = pairs[rng.integers(len(pairs))]
        elif not held_out and (shape, colour) in HELD_OUT_PAIRS:
            continue
        fill = "plain" if radius < 14 or rng.random() < 0.55 else FILLS[rng.integers(1, len(FILLS))]
        reach = radius * 1.2
        place = free(2 * reach, 2 * reach, 2)
        if place is None:
            continue
        x, y = place[0] + reach, place[1] + reach
        around = np.asarray(
            picture.crop((int(x - reach), int(y - reach), int(x + reach), int(y + reach))), dtype=np.float32
        ).mean(axis=(0, 1))
        if np.abs(around - np.array(_RGB[colour])).max() < 70:
            continue  # a white thing on snow is nobody's question
        thing = Thing(shape, colour, fill, x + left, y + top, radius)
        mask, x0, y0 = _draw_thing(rng, picture, thing, left, top)
        kinds = (SHAPES.index(shape) + 1, COLOURS.index(colour) + 1, FILLS.index(fill) + 1)
        _label_mask(labels, best, kinds, mask, x0, y0)
        labels[int(y) // PATCH, int(x) // PATCH, 4] = 1
        things.append(thing)
    return Scene(np.asarray(picture), tuple(things), tuple(signs), corner, labels)


def _label_box(labels: Any, best: Any, glyph: int, x0: float, y0: float, x1: float, y1: float) -> None:
    """Gives a glyph's label to the patches where it covers more of a patch, or of itself, than what is there."""
    area = max((x1 - x0) * (y1 - y0), 1.0)
    for row in range(max(int(y0) // PATCH, 0), min(int(y1) // PATCH + 1, len(labels))):
        for column in range(max(int(x0) // PATCH, 0), min(int(x1) // PATCH + 1, labels.shape[1])):
            width = min(x1, (column + 1) * PATCH) - max(x0, column * PATCH)
            height = min(y1, (row + 1) * PATCH) - max(y0, row * PATCH)
            share = max(width, 0) * max(height, 0) / min(area, PATCH * PATCH)
            if share > max(best[row, column], 0.2):
                best[row, column] = share
                labels[row, column] = (0, 0, 0, glyph, 0)


def _label_mask(labels: Any, best: Any, kinds: tuple[int, int, int], mask: Any, x0: int, y0: int) -> None:
    """Gives a thing's labels to the patches that it covers most."""
    side = PATCH * len(labels)
    whole = np.zeros((side, side), dtype=np.float32)
    top, left = max(y0, 0), max(x0, 0)
    part = mask[top - y0 : side - y0, left - x0 : side - x0]
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    share = whole.reshape(len(labels), PATCH, labels.shape[1], PATCH).mean(axis=(1, 3))
    mine = share > best
    best[mine] = share[mine]
    labels[mine, :3] = kinds
    labels[mine, 3] = 0
