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
    from runtime.bundle import ImageInfo

# What transformers' class takes where a file names nothing else: CLIP's mean and deviation of RGB in 0..1.
_USUAL: Mapping[str, Any] = {
    **COMMON,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
# What published files name otherwise.
_PUBLISHED: Mapping[Version, Mapping[str, Any]] = {
    "qwen2_vl": {},
    "qwen2_5_vl": {},
    "qwen3_vl": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
}
_KIND = "Qwen2VLImageProcessor"


def read_preprocessor(folder: Path | None, geometry: QwenGeometry) -> dict[str, Any]:
    """The settings in `folder`, and those of transformers' class for keys that it leaves out; as published without any.

    The image part of processor_config.json, else preprocessor_config.json. How large and how small a photo may be has
    no say: the size is fixed. Raises CheckpointError for what is no setting of transformers' class, or not of this
    model.
    """
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
    return settings


def image_info(folder: Path | None, geometry: QwenGeometry) -> ImageInfo:
    """How a photo becomes pixel_values: squeezed into the image size, whatever its shape, and normalised."""
    from runtime.bundle import ImageInfo

    height, width = geometry.image_size
    settings = read_preprocessor(folder, geometry)
    try:
        return ImageInfo.from_preprocessor(
            {**settings, "size": {"height": height, "width": width}, "do_center_crop": False}
        )
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
