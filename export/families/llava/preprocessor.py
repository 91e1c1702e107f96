"""Reading a checkpoint folder's preprocessor_config.json, and CLIP's settings where there is no folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.settings import flag, number, read_object, shown
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from runtime.bundle import ImageInfo

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


# They prepare a photo in the same way: resize, crop, rescale, normalise. Older files call them feature extractors.
_KINDS = ("CLIPImageProcessor", "LlavaImageProcessor", "CLIPFeatureExtractor")
_FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb", "do_pad")
_STEPS = ("do_resize", "do_rescale", "do_normalize")
_VALUES = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
# The size that transformers' class takes where a file names none.
_USUAL_SIZE = 224


def read_preprocessor(folder: Path | None, image_size: int) -> dict[str, Any]:
    """Reads the settings in `folder`: the image part of processor_config.json, else preprocessor_config.json.

    They come out in one form: sizes spelled out, and for absent keys what transformers' CLIPImageProcessor takes.
    Without a folder (random weights) and for a folder with neither file: CLIP's own settings for `image_size`, which
    is what every published checkpoint of the family says.

    Raises CheckpointError for settings that no CLIPImageProcessor takes, or that make its result depend on the photo.
    """
    if folder is not None:
        nested = (read_object(folder / "processor_config.json") or {}).get("image_processor")
        if nested is not None:
            if not isinstance(nested, dict):
                raise CheckpointError(
                    f"{folder / 'processor_config.json'}: image_processor must be an object, got {shown(nested)}; "
                    "download the file again"
                )
            return _in_one_form(nested, f"{folder / 'processor_config.json'}: image_processor")
        settings = read_object(folder / "preprocessor_config.json")
        if settings is not None:
            return _in_one_form(settings, str(folder / "preprocessor_config.json"))
    return clip_preprocessor(image_size)


def _in_one_form(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    named = given.get("image_processor_type") or given.get("feature_extractor_type") or _KINDS[0]
    if not isinstance(named, str) or named.removesuffix("Fast").removesuffix("Pil") not in _KINDS:
        raise CheckpointError(
            f"{where}: image_processor_type is {shown(named)}; supported: {', '.join(_KINDS)}; other processors show "
            "the model other pixels: give a checkpoint of LLaVA-1.5"
        )
    settings = {**clip_preprocessor(_USUAL_SIZE), "do_pad": False, **given, "image_processor_type": named}
    for name in _FLAGS:
        # Unlike in config.json, a null is not the default here: transformers takes it for false.
        settings[name] = False if settings[name] is None else flag(f"{where}: {name}", settings[name])
    for name in _STEPS:
        if not settings[name]:
            raise CheckpointError(
                f"{where}: {name} is {json.dumps(given[name])}, so that transformers leaves the step out; "
                "only true is supported; correct it or download the file again"
            )
    if settings["do_pad"] or settings.get("use_square_size"):
        raise CheckpointError(f"{where}: do_pad and use_square_size must be false; only a centre crop is supported")
    settings["do_convert_rgb"] = True  # photos are RGB when they come here
    if not settings["do_center_crop"]:
        del settings["crop_size"]  # many files say null then
    for name in _VALUES:
        if settings.get(name, "") is None:
            raise CheckpointError(
                f"{where}: {name} is null, which transformers does not take; leave the key out for its default, "
                "or download the file again"
            )
    if type(settings["resample"]) is not int or not 0 <= settings["resample"] <= 3:
        raise CheckpointError(
            f"{where}: resample must be one of Pillow's numbers 0..3, got {shown(settings['resample'])}; 3 is bicubic"
        )
    settings["rescale_factor"] = number(f"{where}: rescale_factor", settings["rescale_factor"], above=0)
    for name in ("image_mean", "image_std"):
        if isinstance(settings[name], int | float):  # one number for all channels
            settings[name] = [settings[name]] * 3
    size = settings["size"] = _size(f"{where}: size", settings["size"], square=False)
    if settings["do_center_crop"]:
        crop = settings["crop_size"] = _size(f"{where}: crop_size", settings["crop_size"], square=True)
        if "height" in size and size != crop:
            raise CheckpointError(
                f"{where}: size {size} squeezes the photo and crop_size {crop} cuts it; only one of both is supported: "
                "size with shortest_edge, or the same size for both"
            )
        # What is squeezed into the shape of the crop is not cut any more.
        settings["do_center_crop"] = "height" not in size
    # What decides about the pixels, and nothing else that a file may hold.
    return {name: settings[name] for name in clip_preprocessor(_USUAL_SIZE) if name in settings}


def _size(what: str, got: object, *, square: bool) -> dict[str, int]:
    """A size as an object: a number is a square, or the shortest edge; a pair is height and width."""
    if isinstance(got, list) and len(got) == 2:
        got = {"height": got[0], "width": got[1]}
    elif type(got) is int:
        got = {"height": got, "width": got} if square else {"shortest_edge": got}
    allowed = [{"height", "width"}] if square else [{"height", "width"}, {"shortest_edge"}]
    if isinstance(got, dict) and set(got) in allowed and all(type(edge) is int and edge > 0 for edge in got.values()):
        return got
    either = "" if square else ", or shortest_edge alone"
    raise CheckpointError(
        f"{what} must be height and width in pixels{either}, got {shown(got)}; correct it or download the file again"
    )


def image_info(folder: Path | None, image_size: int) -> ImageInfo:
    """How a photo becomes pixel_values of a tower of `image_size` pixels: from `folder`, or by CLIP's own settings."""
    from runtime.bundle import ImageInfo

    settings = read_preprocessor(folder, image_size)
    try:
        info = ImageInfo.from_preprocessor(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if tuple(info.size) != (image_size, image_size):
        raise CheckpointError(
            f"{folder}: preprocessor_config.json crops to {info.size[0]} x {info.size[1]} pixels, "
            f"but the tower takes {image_size} x {image_size}"
        )
    return info
