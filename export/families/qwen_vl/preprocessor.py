"""The image settings of a Qwen folder, read for a size of image that is fixed when a graph is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.families.image_settings import COMMON, read_settings
from export.families.qwen_vl.config import QwenGeometry, Version
from export.settings import shown
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from runtime.bundle import ImageInfo, PixelsInfo

# What transformers' class takes where a file names nothing else: CLIP's mean and deviation of RGB in 0..1.
_USUAL: Mapping[str, Any] = {
    **COMMON,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
# The least and the most pixels that this class makes of a photo where a file says nothing.
_USUAL_LIMITS = (3136, 1003520)
# What published files name otherwise.
_PUBLISHED_2: Mapping[str, Any] = {"min_pixels": 3136, "max_pixels": 12845056}
_PUBLISHED: Mapping[Version, Mapping[str, Any]] = {
    "qwen2_vl": _PUBLISHED_2,
    "qwen2_5_vl": _PUBLISHED_2,
    "qwen3_vl": {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    },
}
_KIND = "Qwen2VLImageProcessor"


def read_preprocessor(folder: Path | None, geometry: QwenGeometry) -> tuple[dict[str, Any], PixelsInfo]:
    """The settings in `folder`, and those of transformers' class for keys that it leaves out; as published without any.

    The image part of processor_config.json, else preprocessor_config.json. Beside them how large and how small a photo
    may be, which has no say: the size is fixed. Raises CheckpointError for what is no setting of transformers' class,
    or not of this model.
    """
    from runtime.bundle import PixelsInfo

    settings, given, where = read_settings(
        folder, _KIND, _USUAL, f"give a checkpoint of {geometry.version}", without=_PUBLISHED[geometry.version]
    )
    tower = geometry.tower
    for name, size in (
        ("patch_size", tower.patch_size),
        ("temporal_patch_size", tower.frames),
        ("merge_size", tower.merge),
    ):
        if name in given and given[name] != size:
            raise CheckpointError(
                f"{where}: {name} is {shown(given[name])}, but config.json says {size}; the files belong to different "
                "models: download them again"
            )
        settings[name] = size
    least, most = _limits(given, where)
    return settings, PixelsInfo(token=tower.patch_size * tower.merge, least=least, most=most)


def _limits(given: Mapping[str, Any], where: str) -> tuple[int, int]:
    """The least and the most pixels of a photo, which are called edges in `size`."""
    size = given.get("size")
    if size is not None and not isinstance(size, dict):
        raise CheckpointError(f"{where}: size must be an object, got {shown(size)}; download the file again")
    found = []
    for name, other, usual in (
        ("min_pixels", "shortest_edge", _USUAL_LIMITS[0]),
        ("max_pixels", "longest_edge", _USUAL_LIMITS[1]),
    ):
        told = (given.get(name), (size or {}).get(other), usual)
        found.append(next(value for value in told if value is not None))
    least, most = found
    if type(least) is not int or type(most) is not int or not 1 <= least <= most < 2**31:
        raise CheckpointError(
            f"{where}: a photo is to have at least {shown(least)} and at most {shown(most)} pixels (min_pixels and "
            "max_pixels, or size); both must be whole numbers, the first no larger: correct it or download it again"
        )
    return least, most


def image_info(folder: Path | None, geometry: QwenGeometry) -> ImageInfo:
    """How a photo becomes pixel_values: squeezed into the image size, whatever its shape, and normalised."""
    import msgspec

    from runtime.bundle import ImageInfo

    height, width = geometry.image_size
    settings, pixels = read_preprocessor(folder, geometry)
    try:
        info = ImageInfo.from_preprocessor(
            {**settings, "size": {"height": height, "width": width}, "do_center_crop": False}
        )
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return msgspec.structs.replace(info, pixels=pixels)
