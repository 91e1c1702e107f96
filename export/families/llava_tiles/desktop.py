"""LLaVA-NeXT and LLaVA-OneVision by transformers' own modules: what their graphs are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_transforms import divide_to_patches
from transformers.image_utils import ChannelDimension, SizeDict
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from export.families.family import Checkpoint, Seen
from export.families.llava.config import Kind
from export.families.llava.desktop import LlavaDesktop
from export.families.llava_tiles.config import TiledGeometry
from export.families.llava_tiles.preprocessor import read_preprocessor

_PROCESSORS: Mapping[str, Any] = {
    "llava_next": LlavaNextImageProcessorPil,
    "llava_onevision": LlavaOnevisionImageProcessorPil,
}
_MODELS: Mapping[str, Any] = {"llava_next": LlavaNextModel, "llava_onevision": LlavaOnevisionModel}
_FITTED: Any = get_patch_output_size


class TiledDesktop(LlavaDesktop):
    """LlavaDesktop over several views of a photo, which transformers' own code packs into one row of tokens.

    How a photo lies in tiles is nowhere read from our geometry: transformers works it out from the photo's size.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        geometry: TiledGeometry,
        device: torch.device | str,
        kind: Kind,
        image_size: tuple[int, int] | None,
    ) -> None:
        """Raises CheckpointError for a config.json that transformers does not take."""
        super().__init__(checkpoint, geometry, device, kind)
        self._kind, self._image_size = kind.model_type, image_size
        self._processor = _PROCESSORS[self._kind](**read_preprocessor(checkpoint.folder, self._kind, geometry))

    def pixels(self, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(height, width, 3) -> (V, 3, H, W), by transformers' own image processor.

        Its own choice of tiles is passed over: the photo is resized as one of the graph's size is.
        """
        made, image = self._processor, np.moveaxis(photo, -1, 0)
        views = [made.resize(image, size=made.size, resample=made.resample)]
        if self._image_size is not None:
            whole = select_best_resolution(self._image_size, made.image_grid_pinpoints)
            example = np.broadcast_to(np.uint8(0), (3, *self._image_size))
            height, width = _FITTED(example, whole, ChannelDimension.FIRST)
            fitted = made.resize(image, size=SizeDict(height=height, width=width), resample=made.resample)
            views += divide_to_patches(made._pad_for_patching(fitted, whole), made.size.height)
        pixels = [
            made.normalize(made.rescale(view, made.rescale_factor), made.image_mean, made.image_std) for view in views
        ]
        return np.asarray(np.stack(pixels), dtype=np.float32)

    def see(self, pixel_values: Tensor) -> Seen:
        """(V, 3, H, W) -> features (1, T, D), row ends among them, keys (1, N, Dv) and attention (1, N)."""
        seen = self._seen(pixel_values)
        newline = self._checkpoint.tensor("tower.image_newline").float().to(self._device)
        shares = None if seen.attention is None else self._packed(seen.attention[..., None], None)[..., 0]
        return Seen(self._packed(seen.features, newline), self._packed(seen.keys, None), shares)

    def _packed(self, views: Tensor, newline: Tensor | None) -> Tensor:
        """(V, N, W) of all views -> (1, T, W)"""
        own = "vision_feature_select_strategy" if self._kind == "llava_next" else "vision_aspect_ratio"
        packed, _ = _MODELS[self._kind].pack_image_features(
            SimpleNamespace(config=self._config),
            image_features=[views],
            image_sizes=[self._image_size],
            image_newline=newline,
            **{own: getattr(self._config, own)},
        )
        tokens: Tensor = packed[0][None]
        return tokens
