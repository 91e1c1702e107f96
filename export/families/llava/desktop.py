"""LLaVA-1.5 by transformers' own CLIP, projector and LLaMA modules: what its graphs are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import LlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from export.families.desktop import eager, filled
from export.families.family import Checkpoint, Seen
from export.families.llava.config import LlavaGeometry, decisive_part
from export.families.llava.preprocessor import read_preprocessor


class LlavaDesktop:
    """Modules that are filled when they are asked for, so that memory holds one layer and not the model."""

    def __init__(self, checkpoint: Checkpoint, geometry: LlavaGeometry, device: torch.device | str) -> None:
        """Raises CheckpointError for a config.json that transformers does not take."""
        self._checkpoint, self._geometry, self._device = checkpoint, geometry, device
        self._config = eager_config(checkpoint.config)
        self._rotary = LlamaRotaryEmbedding(self._config.text_config).to(device)

    def pixels(self, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(height, width, 3) -> (1, 3, H, W), by transformers' own image processor."""
        settings = read_preprocessor(self._checkpoint.folder, self._geometry.vision.image_size)
        processor = CLIPImageProcessorPil(**settings)
        prepared = processor(photo, input_data_format="channels_last", return_tensors="np")
        return np.asarray(prepared["pixel_values"], dtype=np.float32)

    def see(self, pixel_values: Tensor) -> Seen:
        """(1, 3, H, W) -> features (1, N, D), keys (1, N, Dv) and attention (1, N) of the last layer run.

        All are without the class token, whose attention it is.
        """
        config = self._config.vision_config
        embeddings = self._filled(CLIPVisionEmbeddings(config), "tower.embeddings")
        norm = torch.nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, device="meta")
        hidden = self._filled(norm, "tower.pre_layrnorm")(embeddings(pixel_values))
        keys: list[Tensor] = []
        weights: list[Tensor] = []
        for index in range(self._geometry.tower_layers):
            with torch.device("meta"):
                layer = CLIPEncoderLayer(config)
            self._filled(layer, f"tower.layers.{index}")
            layer.self_attn.k_proj.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
            layer.self_attn.register_forward_hook(lambda _module, _inputs, output: weights.append(output[1]))
            hidden = layer(hidden, None)
            del keys[:-1], weights[:-1]
        with torch.device("meta"):
            projector = LlavaMultiModalProjector(self._config)
        features = self._filled(projector, "tower.projector")(hidden[:, 1:])
        return Seen(features, keys[0][:, 1:], weights[0].mean(1)[:, 0, 1:])

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for hidden (1, T, D) at positions (1, T)."""
        tables: tuple[Tensor, Tensor] = self._rotary(hidden, position_ids=positions)
        return tables

    def layer(self, index: int) -> nn.Module:
        """A decoder layer."""
        with torch.device("meta"):
            layer = LlamaDecoderLayer(self._config.text_config, index)
        return self._filled(layer, f"layers.{index}")

    def norm(self) -> nn.Module:
        """The norm in front of the output matrix."""
        config = self._config.text_config
        return self._filled(LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps), "norm")

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        return filled(module, self._checkpoint, self._device, lambda name: f"{prefix}.{name}")


def eager_config(given: Mapping[str, Any]) -> Any:
    """transformers' own reading of what counts in config.json, with the plain attention that defines the arithmetic."""
    return eager(LlavaConfig, decisive_part(given))
