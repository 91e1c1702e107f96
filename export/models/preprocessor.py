"""Reading a checkpoint folder's preprocessor_config.json, and CLIP's settings where there is no folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from export.models.settings import read_object

# The constants CLIP was trained with; LLaVA-1.5 inherits them.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_preprocessor(image_size: int) -> dict[str, Any]:
    """The preprocessor_config.json of a CLIP tower of `image_size` pixels."""
    return {
        "crop_size": {"height": image_size, "width": image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": image_size},
    }


def read_preprocessor(folder: Path | None, image_size: int) -> dict[str, Any]:
    """The settings in `folder`: preprocessor_config.json, or the image part of the newer processor_config.json.

    Without a folder (random weights) and for a folder with neither file: CLIP's own settings for `image_size`,
    which is what every published checkpoint of the family says.
    """
    if folder is not None:
        settings = read_object(folder / "preprocessor_config.json")
        if settings is not None:
            return settings
        processor = read_object(folder / "processor_config.json")
        if processor is not None and isinstance(processor.get("image_processor"), dict):
            image_processor: dict[str, Any] = processor["image_processor"]
            return image_processor
    return clip_preprocessor(image_size)
