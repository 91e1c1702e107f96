"""What families share in reading the image settings of a checkpoint's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.settings import flag, number, read_object, shown
from runtime.errors import CheckpointError

COMMON: Mapping[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
}
"""What transformers' image processors assume, but for mean and deviation, and what else a class of them has."""
_STEPS = ("do_resize", "do_rescale", "do_normalize")


def read_settings(
    folder: Path | None, kind: str, usual: Mapping[str, Any], remedy: str, *, without: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Mapping[str, Any], str]:
    """Settings in `folder` for the keys of `usual`, whose values count where it leaves one out or there is none.

    From the image part of processor_config.json, else preprocessor_config.json; `without` stands in for the file where
    there is none. Beside them all that was given, and where. Raises CheckpointError for settings of another class of
    transformers than `kind`, with the `remedy`, for steps that are left out, and for values that are none.
    """
    found, where = _given(folder)
    given = (without or {}) if found is None else found
    named = given.get("image_processor_type", kind)
    if not isinstance(named, str) or named.removesuffix("Fast").removesuffix("Pil") != kind:
        raise CheckpointError(
            f"{where}: image_processor_type is {shown(named)}; supported: {kind}; other processors show the model "
            f"other pixels: {remedy}"
        )
    settings = {**usual, **{key: value for key, value in given.items() if key in usual}}
    for name in _STEPS:
        if not flag(f"{where}: {name}", settings[name] if settings[name] is not None else False):
            raise CheckpointError(
                f"{where}: {name} is {json.dumps(settings[name])}, so that transformers leaves the step out; "
                "only true is supported; correct it or download the file again"
            )
    settings["do_convert_rgb"] = True  # photos are RGB when they come here
    if type(settings["resample"]) is not int or not 0 <= settings["resample"] <= 3:
        raise CheckpointError(
            f"{where}: resample must be one of Pillow's numbers 0..3, got {shown(settings['resample'])}; 3 is bicubic"
        )
    settings["rescale_factor"] = number(f"{where}: rescale_factor", settings["rescale_factor"], above=0)
    return settings, given, where


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
