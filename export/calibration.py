"""Photos that show a model what it will see: the default set, and a folder of the caller's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import ImageError, RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# What of the packages' samples looks like something that a phone would be asked about; none needs a download.
SAMPLE_PHOTOS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/camera.png"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/coins.png"),
    ("skimage", "data/hubble_deep_field.jpg"),
    ("skimage", "data/ihc.png"),
    ("skimage", "data/motorcycle_left.png"),
    ("skimage", "data/page.png"),
    ("skimage", "data/rocket.jpg"),
)
SCENES = 12
# Fewer say little about what a model's activations can be; more than MOST only take memory and time.
LEAST_PHOTOS = 8
MOST_PHOTOS = 64


def default_photos(count: int | None = None) -> dict[str, NDArray[np.uint8]]:
    """At least ten photos, uint8 (H, W, 3) RGB, by name, always in the same order; or `count`, spread over them.

    The sample photos of scikit-learn and scikit-image, as far as these are installed, then SCENES rendered ones, whose
    bytes are the same on every machine.
    """
    from runtime.image import load_photo

    makers: dict[str, Callable[[], NDArray[np.uint8]]] = {
        path.name: partial(load_photo, path) for path in sample_paths(SAMPLE_PHOTOS)
    }
    makers |= {f"scene-{number}": partial(rendered_scene, number) for number in range(SCENES)}
    names = list(makers)
    if count is not None:
        names = names[:: len(names) // count][:count]
    return {name: makers[name]() for name in names}


def read_photos(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """The photos in a folder, uint8 (H, W, 3) RGB, by file name in alphabetical order.

    Names that begin with a dot are left out; everything else must be a photo. Raises RequestError for a folder that is
    missing or holds fewer than LEAST_PHOTOS or more than MOST_PHOTOS, ImageError for a file that is no photo.
    """
    from runtime.image import MAX_ASPECT, load_photo

    if not folder.exists():
        raise RequestError(f"calibration={folder} does not exist; give a folder of JPEG, PNG or WebP photos")
    if not folder.is_dir():
        raise RequestError(f"calibration={folder} is a file; give a folder of JPEG, PNG or WebP photos")
    try:
        paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise RequestError(f"calibration={folder} cannot be read: {error.strerror}") from error
    if not LEAST_PHOTOS <= len(paths) <= MOST_PHOTOS:
        bound = f"at least {LEAST_PHOTOS}" if len(paths) < LEAST_PHOTOS else f"at most {MOST_PHOTOS}"
        raise RequestError(f"calibration={folder} holds {len(paths)} images; {bound} are needed")
    photos = {}
    for path in paths:
        # A pipe would be waited for, a device never ends.
        if not path.is_file():
            raise ImageError(f"{path} is not a plain file; a folder to calibrate with holds photos and nothing else")
        photo = load_photo(path)
        height, width = photo.shape[:2]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ImageError(f"{path} is {width} x {height}; its long side may be at most {MAX_ASPECT} times the short")
        photos[path.name] = photo
    return photos


def photos_digest(photos: Mapping[str, NDArray[np.uint8]]) -> str:
    """The sha256 of the photos' sizes and pixels in their order, in hexadecimal; names do not matter."""
    digest = hashlib.sha256()
    for photo in photos.values():
        digest.update(f"{photo.shape}".encode())
        digest.update(photo.tobytes())
    return digest.hexdigest()


def sample_paths(samples: Sequence[tuple[str, str]]) -> tuple[Path, ...]:
    """Where those of `samples`, pairs of a package and a path inside it, lie that are installed, in their order."""
    found = []
    for package, relative in samples:
        spec = find_spec(package)
        if spec is not None and spec.origin is not None and (path := Path(spec.origin).parent / relative).is_file():
            found.append(path)
    return tuple(found)


def rendered_scene(number: int) -> NDArray[np.uint8]:
    """A scene from a seed, uint8 (360, 480, 3): sky and ground, some shapes with edges and stripes, light, grain.

    The light goes from night to glare as `number` goes from 0 to SCENES - 1. Additions, products and comparisons of
    whole numbers only, so that no machine rounds differently.
    """
    import numpy as np

    # The raw stream is the one that numpy promises never to change.
    stream = np.random.PCG64(number)

    def drawn(below: int, count: int) -> NDArray[np.int64]:
        return (stream.random_raw(count) >> np.uint64(11)).astype(np.int64) % below

    height, width = 360, 480
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    above, below = drawn(256, 3), drawn(256, 3)
    horizon = 120 + int(drawn(160, 1)[0])
    fade = np.where(y < horizon, 255 - y * 160 // horizon, 120 + (y - horizon) * 135 // (height - horizon))
    scene = np.where((y < horizon)[:, :, None], above, below) * fade[:, :, None] // 255
    for kind, column, row, wide, high, stripe in zip(
        drawn(3, 14), drawn(width, 14), drawn(height, 14), drawn(110, 14), drawn(110, 14), drawn(24, 14), strict=True
    ):
        colour, other = drawn(256, 3), drawn(256, 3)
        across, down, half, tall = x - column, y - row, wide + 8, high + 8
        if kind == 0:  # an ellipse
            inside = (across * tall) ** 2 + (down * half) ** 2 < (half * tall) ** 2
        elif kind == 1:  # a box
            inside = (abs(across) < half) & (abs(down) < tall)
        else:  # a roof
            inside = (down >= -tall) & (down < tall) & (abs(across) * 2 * tall < half * (down + tall))
        striped = inside & ((across + down * (stripe % 3)) // (stripe + 3) % 2 == 0)
        scene = np.where(inside[:, :, None], np.where(striped[:, :, None], colour, other), scene)
    light = 24 + 40 * number  # of 160
    grain = drawn(25, height * width).reshape(height, width, 1) - 12
    painted: NDArray[np.uint8] = np.clip(scene * light // 160 + grain, 0, 255).astype(np.uint8)
    return painted
