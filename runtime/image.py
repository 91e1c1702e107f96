"""From a photo on disk to the pixel_values a vision graph reads, as the checkpoint's own preprocessor makes them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.bundle import ImageInfo
from runtime.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

# The largest phone cameras in wide use make 108 megapixels; decoded, 128 take 384 MB.
MAX_PIXELS = 128_000_000
# Beyond this a centre crop shows a sliver that no model was trained on, and resizing would need the memory of a bomb.
MAX_ASPECT = 50


def load_photo(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a photo as uint8 (H, W, 3) RGB.

    The EXIF rotation is applied, transparency is laid on white, 16-bit samples keep their upper 8 bits, an animation
    gives its first frame; palette, grey, CMYK and other colour modes are converted. Raises ImageError for anything
    that is no readable photo or has more than MAX_PIXELS.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    path = Path(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns of metadata it skips and of sizes well below our limit; what it cannot decode raises.
            warnings.simplefilter("ignore")
            image: Image.Image
            with Image.open(path) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(
                        f"{path} is {width} x {height}, more than {MAX_PIXELS // 1_000_000} megapixels; "
                        "scale it down first"
                    )
                image.seek(0)
                image.load()
                return np.array(_to_rgb(ImageOps.exif_transpose(image), path), dtype=np.uint8)
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist; give the path of a JPEG, PNG or WebP photo") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder; give the path of a JPEG, PNG or WebP photo") from None
    except Image.DecompressionBombError as err:
        raise ImageError(f"{path} has more than {MAX_PIXELS // 1_000_000} megapixels ({err}); scale it down") from err
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image; give the path of a JPEG, PNG or WebP photo") from None
    # Pillow's decoders report damage in all of these; SyntaxError is what its PNG and EXIF parsers raise.
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, KeyError, IndexError, ArithmeticError) as err:
        raise ImageError(f"{path} is damaged and cannot be decoded ({err}); take another copy of the photo") from err
    except MemoryError:
        raise ImageError(f"{path} does not fit into memory once decoded; scale it down") from None


def _to_rgb(image: Image, path: Path) -> Image:
    from PIL import Image

    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
        samples = np.asarray(image).astype(np.int64)
        if samples.min() < 0 or samples.max() > 65535:
            raise ImageError(f"{path} holds 32-bit samples; save it with 8 or 16 bits a channel")
        return Image.fromarray((samples >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ImageError(f"{path} holds floating-point samples; save it with 8 or 16 bits a channel")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        opaque = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", opaque.size, (255, 255, 255, 255)), opaque).convert("RGB")
    return image.convert("RGB")


def view(photo: np.ndarray, info: ImageInfo) -> np.ndarray:
    """What the model looks at: `photo` uint8 (H, W, 3), resized and cropped to uint8 (*info.size, 3)."""
    from PIL import Image

    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or 0 in photo.shape:
        raise ImageError(f"a photo is uint8 (H, W, 3), not {photo.dtype} {photo.shape}; read it with load_photo")
    height, width = photo.shape[:2]
    short, long = min(height, width), max(height, width)
    if long > MAX_ASPECT * short:
        raise ImageError(f"the photo is {width} x {height}; its long side may be at most {MAX_ASPECT} times the short")
    resample = Image.Resampling[info.resample.upper()]
    crop_height, crop_width = info.size
    if not info.do_center_crop:
        return np.array(Image.fromarray(photo).resize((crop_width, crop_height), resample))
    # The long side is cut off to a whole pixel, not rounded: that is how the CLIP preprocessor does it.
    new_long = int(info.resize_shortest * long / short)
    new_height, new_width = (info.resize_shortest, new_long) if height <= width else (new_long, info.resize_shortest)
    resized = np.asarray(Image.fromarray(photo).resize((new_width, new_height), resample))
    top, left = (new_height - crop_height) // 2, (new_width - crop_width) // 2
    return resized[top : top + crop_height, left : left + crop_width].copy()


def preprocess(photo: np.ndarray, info: ImageInfo) -> np.ndarray:
    """`photo` uint8 (H, W, 3) -> pixel_values float32 (1, 3, *info.size), channels first, normalised."""
    pixels = view(photo, info).astype(np.float32) * np.float32(info.rescale)
    normalised = (pixels - np.asarray(info.mean, np.float32)) / np.asarray(info.std, np.float32)
    return np.ascontiguousarray(normalised.transpose(2, 0, 1)[None])
