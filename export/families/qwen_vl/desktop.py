"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL by transformers' own modules: what their graphs are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.vision_utils import get_vision_window_index

from export.families.desktop import eager, filled, filled_in_turn
from export.families.family import Checkpoint, Seen
from export.families.qwen_vl.config import QwenGeometry, Version, decisive_part
from export.families.qwen_vl.preprocessor import read_preprocessor
from export.families.qwen_vl.tensors import tensors

_CONFIGS: Mapping[Version, Any] = {
    "qwen2_vl": Qwen2VLConfig,
    "qwen2_5_vl": Qwen2_5_VLConfig,
    "qwen3_vl": Qwen3VLConfig,
}
_TOWERS: Mapping[Version, Any] = {
    "qwen2_vl": qwen2_vl.Qwen2VisionTransformerPretrainedModel,
    "qwen2_5_vl": qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel,
    "qwen3_vl": qwen3_vl.Qwen3VLVisionModel,
}
_LAYERS: Mapping[Version, Any] = {
    "qwen2_vl": qwen2_vl.Qwen2VLDecoderLayer,
    "qwen2_5_vl": qwen2_5_vl.Qwen2_5_VLDecoderLayer,
    "qwen3_vl": qwen3_vl.Qwen3VLTextDecoderLayer,
}
_NORMS: Mapping[Version, Any] = {
    "qwen2_vl": qwen2_vl.Qwen2VLRMSNorm,
    "qwen2_5_vl": qwen2_5_vl.Qwen2_5_VLRMSNorm,
    "qwen3_vl": qwen3_vl.Qwen3VLTextRMSNorm,
}
_ROTARIES: Mapping[Version, Any] = {
    "qwen2_vl": qwen2_vl.Qwen2VLRotaryEmbedding,
    "qwen2_5_vl": qwen2_5_vl.Qwen2_5_VLRotaryEmbedding,
    "qwen3_vl": qwen3_vl.Qwen3VLTextRotaryEmbedding,
}


class QwenDesktop:
    """Modules that are filled when they are asked for, so that memory holds one layer and not the model."""

    def __init__(self, checkpoint: Checkpoint, geometry: QwenGeometry, device: torch.device | str) -> None:
        """Raises CheckpointError for a config.json that transformers does not take."""
        self._checkpoint, self._geometry, self._device = checkpoint, geometry, device
        self._version: Version = geometry.version
        self._config = eager_config(checkpoint.config, self._version)
        self._rotary = _ROTARIES[self._version](self._config.text_config).to(device)
        settings, _ = read_preprocessor(checkpoint.folder, geometry)
        self._processor = Qwen2VLImageProcessorPil(**settings)

    def pixels(self, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(height, width, 3) -> (1, 3, H, W), by transformers' own image processor.

        Its own choice of a size is passed over: the photo is resized to the size of the graph.
        """
        made = self._processor
        height, width = self._geometry.image_size
        size = SizeDict(height=height, width=width)
        resized = PilBackend.resize(made, np.moveaxis(photo, -1, 0), size=size, resample=made.resample)
        pixels = made.normalize(made.rescale(resized, made.rescale_factor), made.image_mean, made.image_std)
        return np.asarray(pixels, dtype=np.float32)[None]

    def see(self, pixel_values: Tensor) -> Seen:
        """(1, 3, H, W) -> features and planes (1, N, D), and the last layer's keys (1, N, merge * merge * Dv)."""
        tower, vision = self._tower(), self._config.vision_config
        patches, rows, columns = self._processor.patchify(
            pixel_values[0].cpu().numpy(),
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )
        grid = torch.tensor([[1, rows, columns]], device=self._device)
        seen: dict[str, Any] = {}

        def turned(_module: nn.Module, _inputs: object, given: dict[str, Any]) -> None:
            seen["turns"] = given["position_embeddings"]

        tower.blocks[-1].attn.register_forward_pre_hook(turned, with_kwargs=True)
        tower.blocks[-1].attn.qkv.register_forward_hook(lambda _module, _inputs, out: seen.update(fused=out))
        out = tower(torch.from_numpy(np.array(patches)).to(self._device), grid_thw=grid)
        fused = seen["fused"].view(rows * columns, 3, vision.num_heads, -1)
        keys, _ = qwen2_vl.apply_rotary_pos_emb_vision(fused[:, 1], fused[:, 1], *seen["turns"])
        keys = keys.reshape(self._geometry.image_tokens, -1)
        if self._version == "qwen2_5_vl":  # its patches stand window by window
            order, _ = get_vision_window_index(
                grid,
                spatial_merge_size=vision.spatial_merge_size,
                window_size=vision.window_size,
                patch_size=vision.patch_size,
            )
            keys = keys[torch.argsort(order)]
        planes = getattr(out, "deepstack_features", None) or ()
        return Seen(out.pooler_output[None], keys[None], planes=tuple(plane[None] for plane in planes))

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for hidden (1, T, D) at positions (3, 1, T), or (1, T) where the axes are equal."""
        axes = positions if positions.dim() == 3 else positions.expand(3, 1, -1)
        tables: tuple[Tensor, Tensor] = self._rotary(hidden, position_ids=axes)
        return tables

    def layer(self, index: int) -> nn.Module:
        """A decoder layer."""
        with torch.device("meta"):
            layer = _LAYERS[self._version](self._config.text_config, index)
        return self._filled(layer, lambda name: f"layers.{index}.{name}")

    def norm(self) -> nn.Module:
        """The norm in front of the output matrix."""
        config = self._config.text_config
        return self._filled(
            _NORMS[self._version](config.hidden_size, eps=config.rms_norm_eps), lambda name: f"norm.{name}"
        )

    def _tower(self) -> Any:
        """transformers' whole tower, of which each part is filled when it runs and emptied behind it."""
        config = self._config.vision_config
        with torch.device("meta"):
            tower = _TOWERS[self._version](config)
        tower.rotary_pos_emb = type(tower.rotary_pos_emb)(config).to(self._device)  # made of numbers, not of weights
        spelled = {spelling: name for name, entry in tensors(self._geometry).items() for spelling in entry.stored}

        return filled_in_turn(
            tower, lambda part, path: self._filled(part, lambda name: spelled[f"model.visual.{path}.{name}"])
        )

    def _filled(self, module: nn.Module, canonical: Any) -> nn.Module:
        return filled(module, self._checkpoint, self._device, canonical)


def eager_config(given: Mapping[str, Any], version: Version) -> Any:
    """transformers' own reading of what counts in config.json, with the plain attention that defines the arithmetic."""
    return eager(_CONFIGS[version], decisive_part(given, version))
