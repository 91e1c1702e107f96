"""The image settings of a Qwen folder, read for a size of image that is fixed when a graph is made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.families.qwen_vl.config import QwenGeometry, Version
from export.settings import flag, number, read_object, shown
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from runtime.bundle import ImageInfo

# What transformers' class takes where a file names nothing else: CLIP's mean and deviation of RGB in 0..1.
_USUAL: Mapping[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 1 / 255,
    "resample": 3,
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
_STEPS = ("do_resize", "do_rescale", "do_normalize")


def read_preprocessor(folder: Path | None, geometry: QwenGeometry) -> dict[str, Any]:
    """The settings in `folder`, and those of transformers' class for keys that it leaves out; as published without any.

    The image part of processor_config.json, else preprocessor_config.json. How large and how small a photo may be has
    no say: the size is fixed. Raises CheckpointError for what is no setting of transformers' class, or not of this
    model.
    """
    found, where = _given(folder)
    given = _PUBLISHED[geometry.version] if found is None else found
    named = given.get("image_processor_type", _KIND)
    if not isinstance(named, str) or named.removesuffix("Fast").removesuffix("Pil") != _KIND:
        raise CheckpointError(
            f"{where}: image_processor_type is {shown(named)}; supported: {_KIND}; other processors show the model "
            f"other pixels: give a checkpoint of {geometry.version}"
        )
    settings = {**_USUAL, **{key: value for key, value in given.items() if key in _USUAL}}
    for name in _STEPS:
        if not flag(f"{where}: {name}", settings[name] if settings[name] is not None else False):
            raise CheckpointError(
                f"{where}: {name} is {json.dumps(settings[name])}, so that transformers leaves the step out; "
                "only true is supported; correct it or download the file again"
            )
    settings["do_convert_rgb"] = True  # photos are RGB when they come here
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
    if type(settings["resample"]) is not int or not 0 <= settings["resample"] <= 3:
        raise CheckpointError(
            f"{where}: resample must be one of Pillow's numbers 0..3, got {shown(settings['resample'])}; 3 is bicubic"
        )
    settings["rescale_factor"] = number(f"{where}: rescale_factor", settings["rescale_factor"], above=0)
    return settings


def _given(folder: Path | None) -> tuple[Mapping[str, Any] | None, str]:
    if folder is None:
        return None, "image settings"
    path = folder / "processor_config.json"
    nested = (read_object(path) or {}).get("image_processor")
    if nested is None:
        path = folder / "preprocessor_config.json"
        return read_object(path), str(path)
    if not isinstance(nested, dict):
        raise CheckpointError(
            f"{path}: image_processor must be an object, got {shown(nested)}; download the file again"
        )
    return nested, f"{path}: image_processor"


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
