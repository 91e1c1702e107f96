"""LLaVA models by transformers' own towers, projectors and decoder layers: what their graphs are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import LlavaConfig, LlavaNextConfig, LlavaOnevisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionMultiModalProjector
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from export.families.desktop import DecoderDesktop, eager
from export.families.family import Checkpoint, Seen
from export.families.llava.config import LLAVA_KIND, Kind, LlavaGeometry, decisive_part
from export.families.llava.preprocessor import read_preprocessor

# The config and the projector of each type of model, and layer, norm and rotary embedding of each type of decoder.
_MODELS: Mapping[str, tuple[Any, Any]] = {
    "llava": (LlavaConfig, LlavaMultiModalProjector),
    "llava_next": (LlavaNextConfig, LlavaNextMultiModalProjector),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionMultiModalProjector),
}
_DECODERS: Mapping[str, tuple[Any, Any, Any]] = {
    "llama": (LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding),
    "mistral": (mistral.MistralDecoderLayer, mistral.MistralRMSNorm, mistral.MistralRotaryEmbedding),
    "qwen2": (qwen2.Qwen2DecoderLayer, qwen2.Qwen2RMSNorm, qwen2.Qwen2RotaryEmbedding),
}


class LlavaDesktop(DecoderDesktop):
    """The tower layer by layer, and the decoder."""

    def __init__(
        self, checkpoint: Checkpoint, geometry: LlavaGeometry, device: torch.device | str, kind: Kind = LLAVA_KIND
    ) -> None:
        """Raises CheckpointError for a config.json that transformers does not take."""
        self._geometry, self._projects = geometry, _MODELS[kind.model_type][1]
        self._config = eager_config(checkpoint.config, kind)
        decoder = self._config.text_config
        super().__init__(checkpoint, device, decoder, _DECODERS[decoder.model_type])

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
        return self._seen(pixel_values)

    def _seen(self, pixel_values: Tensor) -> Seen:
        """The same of each of several pictures (V, 3, H, W); no attention where the tower has no class token."""
        config, first = self._config.vision_config, int(self._geometry.vision.class_token)
        embeddings = (CLIPVisionEmbeddings if first else SiglipVisionEmbeddings)(config)
        hidden = self._filled(embeddings, "tower.embeddings")(pixel_values)
        if first:
            norm = torch.nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, device="meta")
            hidden = self._filled(norm, "tower.pre_layrnorm")(hidden)
        keys: list[Tensor] = []
        weights: list[Tensor] = []
        for index in range(self._geometry.tower_layers):
            with torch.device("meta"):
                layer = (CLIPEncoderLayer if first else SiglipEncoderLayer)(config)
            self._filled(layer, f"tower.layers.{index}")
            layer.self_attn.k_proj.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
            layer.self_attn.register_forward_hook(lambda _module, _inputs, output: weights.append(output[1]))
            hidden = layer(hidden, None)
            del keys[:-1], weights[:-1]
        with torch.device("meta"):
            projector = self._projects(self._config)
        features = self._filled(projector, "tower.projector")(hidden[:, first:])
        return Seen(features, keys[0][:, first:], weights[0].mean(1)[:, 0, 1:] if first else None)


def eager_config(given: Mapping[str, Any], kind: Kind = LLAVA_KIND) -> Any:
    """transformers' own reading of what counts in config.json, with the plain attention that defines the arithmetic."""
    return eager(_MODELS[kind.model_type][0], decisive_part(given, kind))
