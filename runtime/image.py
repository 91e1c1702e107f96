"""From a photo on disk to the pixel_values a vision graph reads, as the checkpoint's own preprocessor makes them."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from runtime.bundle import ImageInfo
from runtime.errors import ImageError
from runtime.names import readable

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

# The largest phone cameras in wide use make 108 megapixels; decoded, 128 take 384 MB.
MAX_PIXELS = 128_000_000
# Beyond this a centre crop shows a sliver that no model was trained on, and resizing would need the memory of a bomb.
MAX_ASPECT = 50
# Pixels of the longer edge of a view that is shown: sharp on dense screens, some 100 kB as JPEG.
_SHOWN_EDGE = 672

# What Pillow's decoders raise when a file leads them astray; SyntaxError is what its PNG and EXIF parsers raise.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Pillow opens these, and has or starts other programs to draw them.
DRAWINGS = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
# Place and first bytes of what people take for a photo.
OTHER_FILES = (
    (4, b"ftyphei", "a HEIF photo; save it as JPEG"),
    (4, b"ftyphev", "a HEIF photo; save it as JPEG"),
    (4, b"ftypmif1", "a HEIF photo; save it as JPEG"),
    (4, b"ftypcrx", "a raw photo; save it as JPEG"),
    (4, b"ftyp", "a video"),
    (0, b"\x1aE\xdf\xa3", "a video"),
    (0, b"\xff\x0a", "a JPEG XL photo; save it as JPEG"),
    (4, b"JXL \r\n", "a JPEG XL photo; save it as JPEG"),
    (0, b"%PDF", "a PDF document"),
    (0, b"<svg", "an SVG drawing"),
    (0, b"<?xml", "an XML document, perhaps an SVG drawing"),
    (0, b"<!DOCTYPE", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"PK\x03\x04", "a ZIP archive"),
    (0, b"version https://git-lfs", "a pointer of Git LFS; fetch the file itself"),
)
# Tags of TIFF.
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262


def load_photo(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a photo as uint8 (H, W, 3) RGB.

    The EXIF rotation is applied, transparency is laid on white, 16-bit samples keep their upper 8 bits, an animation
    gives its first frame; palette, grey, CMYK and other colour modes are converted as Pillow does. Colour profiles are
    not applied, as in the image processors that models were trained with. Raises ImageError for anything that is no
    readable photo or has more than MAX_PIXELS.
    """
    from PIL import Image, UnidentifiedImageError

    path, name = Path(path), readable(path)
    kind = "image"
    try:
        _check_is_file(path, name)
        with warnings.catch_warnings():
            # Pillow warns of metadata it skips and of sizes well below our limit; what it cannot decode raises.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                kind = f"{image.format} image of mode {image.mode}"
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(
                        f"{name} is {width} x {height}, more than {MAX_PIXELS // 1_000_000} megapixels; "
                        "scale it down first"
                    )
                if image.format in DRAWINGS:
                    raise ImageError(
                        f"{name} is a file of kind {image.format}, which only other programs can draw; "
                        "save it as JPEG, PNG or WebP"
                    )
                image.seek(0)
                rgb = _to_rgb(image, path, name)
                return np.array(_upright(rgb, _orientation(image)), dtype=np.uint8)
    except FileNotFoundError:
        what = "is a link to nothing" if path.is_symlink() else "does not exist"
        raise ImageError(f"{name} {what}; give the path of a JPEG, PNG or WebP photo") from None
    except Image.DecompressionBombError as err:
        raise ImageError(f"{name} has more than {MAX_PIXELS // 1_000_000} megapixels ({err}); scale it down") from err
    except UnidentifiedImageError:
        raise ImageError(_no_image(path, name)) from None
    except MemoryError:
        raise ImageError(f"{name} does not fit into memory once decoded; scale it down") from None
    except DAMAGE as err:
        # Pillow's own OSErrors have no number: with one it is the system that speaks, and the file may be sound.
        if isinstance(err, OSError) and err.errno is not None:
            raise ImageError(f"{name} cannot be read: {err.strerror}; give a photo that can be read") from err
        raise ImageError(
            f"{name} is damaged and cannot be decoded ({kind}: {err}); take another copy of the photo"
        ) from err


def _check_is_file(path: Path, name: str) -> None:
    """Refuses what cannot be read as a file: folders, and pipes and devices, which may never end."""
    try:
        mode = path.stat().st_mode
    except ValueError:
        raise ImageError(f"{name} cannot be the name of a file; give the path of a JPEG, PNG or WebP photo") from None
    if stat.S_ISDIR(mode):
        raise ImageError(f"{name} is a folder; give the path of a JPEG, PNG or WebP photo")
    if not stat.S_ISREG(mode):
        raise ImageError(f"{name} is a pipe or a device; give the path of a JPEG, PNG or WebP photo")


def _no_image(path: Path, name: str) -> str:
    """The refusal of a file that Pillow does not know, with what it is where its first bytes tell."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as err:
        return f"{name} cannot be read: {err.strerror}; give a photo that can be read"
    kinds = [kind for at, mark, kind in OTHER_FILES if head[at : at + len(mark)] == mark]
    what = f" (it is {kinds[0] if head else 'an empty file'})" if kinds or not head else ""
    return f"{name} is not an image; give the path of a JPEG, PNG or WebP photo{what}"


def _orientation(image: ImageFile) -> int:
    """The EXIF orientation; 1, upright, where the metadata is broken: the pixels are none the worse for it."""
    from PIL.ExifTags import Base

    try:
        found = image.getexif().get(Base.Orientation, 1)
    except DAMAGE:
        return 1
    return found if isinstance(found, int) else 1


def _upright(image: Image, orientation: int) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _to_rgb(image: ImageFile, path: Path, name: str) -> Image:
    """Decodes an open image to RGB, transparency laid on white."""
    from PIL import Image

    tile = image.tile[0] if image.tile else None  # decoding forgets it
    image.load()
    if image.mode == "F":
        raise ImageError(
            f"{name}, a {image.format} image, holds floating-point samples; save it with 8 or 16 bits a channel"
        )
    level = image.info.get("transparency")
    if image.mode.startswith("I"):
        samples = _grey16(image, name)
        grey = Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
        return grey if level is None else _on_white(grey, samples != level)
    if image.format == "PNG" and image.mode in ("L", "RGB") and level is not None:
        return _on_white(image.convert("RGB"), _png_opaque(image, path, level, str(tile.args) if tile else ""))
    if image.has_transparency_data:
        # Pillow has no way from premultiplied grey to colour.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    if image.format == "GIF" and tile is not None and tile.extents not in (None, (0, 0, *image.size)):
        # The first frame may cover a part only; nothing is behind the rest.
        seen = Image.new("RGB", image.size, "white")
        seen.paste(rgb.crop(tile.extents), tile.extents[:2])
        return seen
    return rgb


def _on_white(image: Image, opaque: np.ndarray) -> Image:
    """White where `opaque` (H, W) is False."""
    from PIL import Image

    return Image.composite(image, Image.new("RGB", image.size, "white"), Image.fromarray(opaque))


def _grey16(image: ImageFile, name: str) -> np.ndarray:
    """The samples of one channel, int64 (H, W), in 0..65535."""
    samples = np.asarray(image).astype(np.int64)
    if samples.min() < 0 or samples.max() > 65535:
        raise ImageError(f"{name}, a {image.format} image, holds 32-bit samples; save it with 8 or 16 bits a channel")
    tags = getattr(image, "tag_v2", {})
    if tags.get(TIFF_BITS) == (12,):
        samples = samples << 4
    # Pillow turns negatives round for 8 bits alone.
    return 65535 - samples if tags.get(TIFF_PHOTOMETRIC) == 0 else samples


def _png_opaque(image: ImageFile, path: Path, level: int | tuple[int, ...], layout: str) -> np.ndarray:
    """Where a PNG's samples are not its transparent level: (H, W) bool.

    `level` has as many bits as the file's samples, `layout` names them; Pillow makes 8 of both more and fewer.
    """
    from PIL import Image

    samples = np.asarray(image).astype(np.int64)
    bits = {"L;2": 2, "L;4": 4, "RGB;16B": 16}.get(layout, 8)
    if bits == 16:
        with Image.open(path) as low:
            # Read as if the lower byte came first, the upper 8 bits are the lower ones.
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            samples = samples << 8 | np.asarray(low)
    wanted = np.asarray(level) & (2**bits - 1)
    if bits < 8:
        wanted = wanted * 255 // (2**bits - 1)
    different = np.asarray(samples != wanted)
    return np.asarray(different.any(2)) if image.mode == "RGB" else different


def view(photo: np.ndarray, info: ImageInfo) -> np.ndarray:
    """What the model looks at: `photo` uint8 (H, W, 3), resized and cropped to uint8 (*info.size, 3)."""
    _check_photo(photo)
    height, width = photo.shape[:2]
    crop_height, crop_width = info.size
    if not info.do_center_crop:
        return _squeezed(photo, info.size, info)
    # The long side is cut off to a whole pixel, not rounded: that is how the CLIP preprocessor does it.
    new_long = int(info.resize_shortest * max(height, width) / min(height, width))
    new_height, new_width = (info.resize_shortest, new_long) if height <= width else (new_long, info.resize_shortest)
    resized = _squeezed(photo, (new_height, new_width), info)
    top, left = (new_height - crop_height) // 2, (new_width - crop_width) // 2
    return resized[top : top + crop_height, left : left + crop_width].copy()


def tiles(photo: np.ndarray, info: ImageInfo) -> list[np.ndarray]:
    """What the model looks at closely: `photo` uint8 (H, W, 3) in tiles, row by row, each uint8 (*info.size, 3).

    Empty where a photo is seen as a whole alone.
    """
    if info.tiles is None:
        return []
    _check_photo(photo)
    height, width = info.size
    rows, columns = info.tiles.grid
    resized = _squeezed(photo, info.tiles.resize, info)
    canvas = np.zeros((rows * height, columns * width, 3), np.uint8)
    top, left = ((whole - edge) // 2 for whole, edge in zip(canvas.shape, resized.shape[:2], strict=False))
    canvas[top : top + resized.shape[0], left : left + resized.shape[1]] = resized
    split = canvas.reshape(rows, height, columns, width, 3).swapaxes(1, 2)
    return list(split.reshape(rows * columns, height, width, 3))


def _squeezed(photo: np.ndarray, size: tuple[int, int], info: ImageInfo) -> np.ndarray:
    """`photo` uint8 (H, W, 3) resized to (height, width), whatever its shape."""
    from PIL import Image

    height, width = size
    return np.array(Image.fromarray(photo).resize((width, height), Image.Resampling[info.resample.upper()]))


def _check_photo(photo: np.ndarray) -> None:
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or 0 in photo.shape:
        raise ImageError(f"a photo is uint8 (H, W, 3), not {photo.dtype} {photo.shape}; read it with load_photo")
    height, width = photo.shape[:2]
    short, long = min(height, width), max(height, width)
    if long > MAX_ASPECT * short:
        raise ImageError(f"the photo is {width} x {height}; its long side may be at most {MAX_ASPECT} times the short")


def enlarged_view(photo: np.ndarray, info: ImageInfo) -> np.ndarray:
    """What the model looks at, for people: the same part of `photo`, larger by a whole factor where that is sharper."""
    scale = max(1, _SHOWN_EDGE // max(info.size))
    larger = msgspec.structs.replace(
        info, size=(info.size[0] * scale, info.size[1] * scale), resize_shortest=info.resize_shortest * scale
    )
    return view(photo, larger)


def view_jpeg(photo: np.ndarray, info: ImageInfo) -> bytes:
    """A JPEG of the enlarged view."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(enlarged_view(photo, info)).save(buffer, "JPEG", quality=85, optimize=True)
    return buffer.getvalue()


def preprocess(photo: np.ndarray, info: ImageInfo) -> np.ndarray:
    """`photo` uint8 (H, W, 3) -> pixel_values float32 (V, 3, *info.size), channels first, normalised.

    V is 1, or with tiles one more than there are: the whole photo comes first.
    """
    pixels = np.stack([view(photo, info), *tiles(photo, info)]).astype(np.float32) * np.float32(info.rescale)
    normalised = (pixels - np.asarray(info.mean, np.float32)) / np.asarray(info.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(0, 3, 1, 2))
