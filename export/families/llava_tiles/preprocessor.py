"""The image settings of a folder of LLaVA-NeXT or LLaVA-OneVision, read for a size of image that is fixed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.families.image_settings import COMMON, read_settings
from export.families.llava.preprocessor import CLIP_MEAN, CLIP_STD
from export.families.llava_tiles.config import TiledGeometry
from export.settings import shown
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from runtime.bundle import ImageInfo

# transformers' class of each type of model, and the mean and deviation of RGB that its published files have.
_KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llava_next": (
        "LlavaNextImageProcessor",
        {**COMMON, "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)},
    ),
    "llava_onevision": (
        "LlavaOnevisionImageProcessor",
        {**COMMON, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    ),
}


def read_preprocessor(folder: Path | None, model_type: str, geometry: TiledGeometry) -> dict[str, Any]:
    """The settings in `folder`, those of published files for keys that it leaves out, and for no folder or none in it.

    With the size of a view and the sizes of all tiles, for transformers' class. Raises CheckpointError for what is no
    setting of it, or not of this model.
    """
    kind, published = _KINDS[model_type]
    settings, given, where = read_settings(folder, kind, published, f"give a checkpoint of the type {model_type}")
    edge = geometry.vision.image_size
    for name in ("size", "crop_size"):
        said = given.get(name) or {}
        edges = [said] if type(said) is int else list(said.values()) if isinstance(said, dict) else [said]
        if any(one != edge for one in edges):
            raise CheckpointError(
                f"{where}: {name} is {shown(said)}, but the tower takes {edge} x {edge} pixels; the files belong to "
                "different models: download them again"
            )
    pinpoints = [list(pinpoint) for pinpoint in geometry.pinpoints]
    said = given.get("image_grid_pinpoints") or pinpoints
    if not isinstance(said, list) or [list(one) if isinstance(one, list) else one for one in said] != pinpoints:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints are not those of config.json, so that pixels and tokens would not belong "
            "together; download the files again"
        )
    return {**settings, "size": {"height": edge, "width": edge}, "image_grid_pinpoints": pinpoints}


def image_info(folder: Path | None, model_type: str, geometry: TiledGeometry) -> ImageInfo:
    """How a photo becomes pixel_values: squeezed into a view and, with tiles, into these, whatever its shape."""
    import msgspec

    from runtime.bundle import ImageInfo, PinpointsInfo, TilesInfo

    settings = read_preprocessor(folder, model_type, geometry)
    try:
        info = ImageInfo.from_preprocessor({**settings, "do_center_crop": False})
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    vision = geometry.vision
    own = PinpointsInfo(sizes=geometry.pinpoints, tile=vision.image_size, side=vision.grid[0], most=geometry.most_tiles)
    info = msgspec.structs.replace(info, pinpoints=own)
    if geometry.tiling is None:
        return info
    tiling = geometry.tiling
    return msgspec.structs.replace(info, tiles=TilesInfo(resize=tiling.resize, grid=tiling.tiles))
