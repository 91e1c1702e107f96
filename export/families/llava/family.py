"""The LLaVA-1.5 family: a CLIP tower, a projector of two layers and a LLaMA decoder, and one entry per known model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.families.family import Checkpoint, Desktop, Frame, ModelEntry, TensorEntry
from export.families.llava.config import VISION_WHEN_ABSENT, LlavaGeometry, with_image_token
from export.families.llava.hub_files import hub_files
from export.families.llava.preprocessor import image_info
from export.families.llava.tensors import other_layout, stray, tensors
from runtime.errors import RequestError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from export.blocks.decoder_layer import DecoderLayer
    from runtime.bundle import ImageInfo


class Llava:
    """LLaVA-1.5 (arXiv 2310.03744): each prompt is a prefix, one square image of single patches, and the question."""

    name = model_type = "llava"
    class_token = True
    image_marks = "", ""
    backends = None
    drop_in = True

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """What `--model` can name of it."""
        return LLAVA_7B, LLAVA_13B, POCKET

    def resized(self, size: tuple[int, int]) -> Llava:
        """Raises RequestError: the size is the checkpoint's."""
        raise RequestError(
            "image_size is for models that take photos of any size; the tower of LLaVA-1.5 has one, which its "
            "config.json says: leave --image-size out"
        )

    def whole_config(self, folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Completes a config.json by the image token's id, which some leave to the tokenizer."""
        return with_image_token(folder, config)

    def geometry(self, config: Mapping[str, Any]) -> LlavaGeometry:
        """Reads the sizes; CheckpointError when it is no config.json of the family, or contradicts itself."""
        return LlavaGeometry.from_config(config)

    def tensors(self, geometry: LlavaGeometry) -> Mapping[str, TensorEntry]:
        """Lists every tensor of the whole model by its canonical name."""
        return tensors(geometry)

    def stray(self, stored: str) -> str | None:
        """Says what to do about a stored tensor that no model of the family has; None for no part of a model."""
        return stray(stored)

    def other_layout(self, stored: Sequence[str]) -> str | None:
        """Recognises what LLaVA's authors publish."""
        return other_layout(stored)

    def image(self, folder: Path | None, geometry: LlavaGeometry) -> ImageInfo:
        """How a photo becomes pixel_values: from the folder's files, or CLIP's own settings."""
        return image_info(folder, geometry.vision.image_size)

    def frame(self, prefix_ids: Sequence[int], geometry: LlavaGeometry) -> Frame:
        """Lays out prefix and image, after which the text goes on at the next position."""
        return Frame.of_one_image(prefix_ids, geometry.image_token_id, geometry.grid)

    def tower(self, geometry: LlavaGeometry) -> nn.Module:
        """pixel_values (1, 3, H, W) -> Seen: CLIP's tower and the projector."""
        from export.families.llava.tower import ClipTower, projector

        return ClipTower(geometry.vision, layers=geometry.tower_layers, projector=projector(geometry))

    def layer(self, geometry: LlavaGeometry) -> DecoderLayer:
        """A layer of LLaMA."""
        from export.blocks.decoder_layer import DecoderLayer

        return DecoderLayer(geometry.text)

    def desktop(self, checkpoint: Checkpoint, device: torch.device | str) -> Desktop:
        """The same model by transformers' own modules."""
        from export.families.llava.desktop import LlavaDesktop

        return LlavaDesktop(checkpoint, self.geometry(checkpoint.config), device)

    def hub_files(self, checkpoint: Checkpoint, *, image_token: str, keep: int) -> dict[str, dict[str, Any]]:
        """The config files by which LlavaProcessor and its JavaScript twin take `keep` image tokens."""
        geometry = self.geometry(checkpoint.config)
        return hub_files(checkpoint.folder, checkpoint.config, geometry, image_token=image_token, keep=keep)


LLAVA = Llava()

# The system prompt LLaVA-1.5 was trained with (Vicuna's); with it the prefix has the 35 tokens of the paper's costs.
VICUNA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def _llava_config(*, hidden: int, mlp: int, layers: int, heads: int) -> Mapping[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "image_seq_length": 576,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": dict(VISION_WHEN_ABSENT),
        "text_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    }


_POCKET_CONFIG: Mapping[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "dtype": "float16",
    "image_seq_length": 576,
    "image_token_index": 3,
    "model_type": "llava",
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "text_config": {
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 48,
        "hidden_act": "silu",
        "hidden_size": 288,
        "intermediate_size": 640,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 6,
        "num_hidden_layers": 6,
        "num_key_value_heads": 6,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": 640,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "hidden_act": "quick_gelu",
        "hidden_size": 192,
        "image_size": 336,
        "intermediate_size": 768,
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_attention_heads": 6,
        "num_channels": 3,
        "num_hidden_layers": 7,
        "patch_size": 14,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}

LLAVA_7B = ModelEntry(
    family=LLAVA,
    name="llava-1.5-7b",
    summary="LLaVA-1.5 with Vicuna 7B: 576 image tokens, 32 layers of width 4096",
    hub_id="llava-hf/llava-1.5-7b-hf",
    config=_llava_config(hidden=4096, mlp=11008, layers=32, heads=32),
    system_prompt=VICUNA_SYSTEM,
)
LLAVA_13B = ModelEntry(
    family=LLAVA,
    name="llava-1.5-13b",
    summary="LLaVA-1.5 with Vicuna 13B: 576 image tokens, 40 layers of width 5120",
    hub_id="llava-hf/llava-1.5-13b-hf",
    config=_llava_config(hidden=5120, mlp=13824, layers=40, heads=40),
    system_prompt=VICUNA_SYSTEM,
)
POCKET = ModelEntry(
    family=LLAVA,
    name="pocket",
    summary="18 MB, trained on rendered scenes, comes with pruneport: LLaVA with the real 576 image tokens",
    hub_id=None,
    config=_POCKET_CONFIG,
    # What is compared with it is the export, not what quantising a small model does.
    precision="fp32",
    quant_text="none",
    questions=Path(__file__).parents[2] / "models" / "pocket-questions" / "questions.jsonl",
)
