"""The families Qwen2-VL, Qwen2.5-VL and Qwen3-VL, which differ in their layers alone; an entry per known model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.families.family import Checkpoint, Desktop, Frame, ModelEntry, PlainFamily, TensorEntry
from export.families.qwen_vl.config import QwenGeometry, Version
from export.families.qwen_vl.preprocessor import image_info
from export.families.qwen_vl.tensors import tensors
from runtime.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.bundle import ImageInfo

# 24 x 24 image tokens, as many as LLaVA-1.5 has.
_TOKENS_OF_AN_EDGE = 24


@dataclass(frozen=True)
class QwenVl(PlainFamily[QwenGeometry]):
    """Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923) or Qwen3-VL (2511.21631) at one size of image.

    The models take photos of any size. A graph is static, so that one size is chosen when it is made, and photos are
    squeezed into it. Each prompt is a prefix, one image, whose tokens have the positions (t, row, column), and the
    question, which goes on at the position behind the largest of these. `image_size` is (height, width) in pixels.
    """

    name: str
    version: Version
    image_size: tuple[int, int]
    built_parts = "visual.", "model.", "lm_head."

    @property
    def model_type(self) -> str:
        """What a config.json of it calls itself."""
        return self.version

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """What `--model` can name of it."""
        return tuple(entry for entry in _MODELS if entry.family == self)

    def resized(self, size: tuple[int, int]) -> QwenVl:
        """The same for images of (height, width) pixels."""
        return replace(self, image_size=size)

    def geometry(self, config: Mapping[str, Any]) -> QwenGeometry:
        """Reads the sizes; CheckpointError when it is no config.json of the family, or contradicts itself."""
        return QwenGeometry.from_config(config, self.version, self.image_size)

    def tensors(self, geometry: QwenGeometry) -> Mapping[str, TensorEntry]:
        """Lists every tensor of the whole model by its canonical name."""
        return tensors(geometry)

    def image(self, folder: Path | None, geometry: QwenGeometry) -> ImageInfo:
        """How a photo becomes pixel_values: from the folder's files, or as published, at the size of the graph."""
        return image_info(folder, geometry)

    def frame(self, prefix_ids: Sequence[int], geometry: QwenGeometry) -> Frame:
        """Lays out prefix and image; text goes on behind the largest position of the image."""
        rows, columns = geometry.grid
        first, count = len(prefix_ids), geometry.image_tokens
        places = tuple((0, y, x) for y in range(rows) for x in range(columns))
        return Frame(
            ids=(*prefix_ids, *(geometry.image_token_id for _ in range(count))),
            slots=tuple(range(first, first + count)),
            positions=tuple((*range(first), *(first + place[axis] for place in places)) for axis in range(3)),
            places=places,
            first_text=first + max(rows, columns),
        )

    def tower(self, geometry: QwenGeometry) -> nn.Module:
        """pixel_values (1, 3, H, W) -> Seen: the tower and its merger."""
        from export.families.qwen_vl.tower import QwenTower

        return QwenTower(geometry)

    def desktop(self, checkpoint: Checkpoint, device: torch.device | str) -> Desktop:
        """The same model by transformers' own modules."""
        from export.families.qwen_vl.desktop import QwenDesktop

        return QwenDesktop(checkpoint, self.geometry(checkpoint.config), device)

    def hub_files(self, checkpoint: Checkpoint, *, image_token: str, keep: int) -> dict[str, dict[str, Any]]:
        """Raises ExportError: Hugging Face's runtimes compute three axes of positions from the size of the image."""
        raise ExportError(
            f"no Hugging Face runtime takes a pruned image of {self.name}: they compute the positions of its tokens "
            "from the photo's size; leave --layout out"
        )


def _family(name: str, version: Version, *, step: int) -> QwenVl:
    edge = _TOKENS_OF_AN_EDGE * step
    return QwenVl(name, version, (edge, edge))


QWEN2_VL = _family("qwen2-vl", "qwen2_vl", step=28)
QWEN2_5_VL = _family("qwen2.5-vl", "qwen2_5_vl", step=28)
QWEN3_VL = _family("qwen3-vl", "qwen3_vl", step=32)

# <|im_start|>system ... <|im_start|>user <|vision_start|>: what the published chat template puts before the image.
_PREFIX_TOKENS = 15
# <|im_start|>user <|vision_start|>: no system prompt.
_PREFIX_TOKENS_3 = 4


def _config(
    version: Version, *, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool
) -> Mapping[str, Any]:
    tower: Mapping[Version, Mapping[str, Any]] = {
        "qwen2_vl": {"embed_dim": 1280, "hidden_size": hidden, "hidden_act": "quick_gelu", "mlp_ratio": 4},
        "qwen2_5_vl": {
            "hidden_size": 1280,
            "out_hidden_size": hidden,
            "hidden_act": "silu",
            "intermediate_size": 3420,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "qwen3_vl": {
            "depth": 24,
            "hidden_size": 1024,
            "out_hidden_size": hidden,
            "hidden_act": "gelu_pytorch_tanh",
            "intermediate_size": 4096,
            "patch_size": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    }
    third = version == "qwen3_vl"
    sections = {"mrope_section": [24, 20, 20], "mrope_interleaved": True} if third else {"mrope_section": [16, 24, 24]}
    decoder: Mapping[Version, Mapping[str, Any]] = {
        "qwen2_vl": {"max_position_embeddings": 32768},
        "qwen2_5_vl": {"max_position_embeddings": 128000},
        "qwen3_vl": {"max_position_embeddings": 262144, "head_dim": 128, "attention_bias": False},
    }
    return {
        "model_type": version,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": tied,
        "vision_config": {
            "model_type": f"{version}_vision",
            "depth": 32,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **tower[version],
        },
        "text_config": {
            "model_type": f"{version}_text",
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            **decoder[version],
            "rms_norm_eps": 1e-6,
            "vocab_size": vocab,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e6 if third else 1e6, **sections},
        },
    }


_MODELS: tuple[ModelEntry, ...] = (
    ModelEntry(
        family=QWEN2_VL,
        name="qwen2-vl-2b",
        summary="Qwen2-VL 2B: an image token for each 28 x 28 pixels, 28 layers of width 1536",
        hub_id="Qwen/Qwen2-VL-2B-Instruct",
        config=_config("qwen2_vl", hidden=1536, mlp=8960, layers=28, heads=12, kv_heads=2, vocab=151936, tied=True),
        prefix_tokens=_PREFIX_TOKENS,
    ),
    ModelEntry(
        family=QWEN2_VL,
        name="qwen2-vl-7b",
        summary="Qwen2-VL 7B: an image token for each 28 x 28 pixels, 28 layers of width 3584",
        hub_id="Qwen/Qwen2-VL-7B-Instruct",
        config=_config("qwen2_vl", hidden=3584, mlp=18944, layers=28, heads=28, kv_heads=4, vocab=152064, tied=False),
        prefix_tokens=_PREFIX_TOKENS,
    ),
    ModelEntry(
        family=QWEN2_5_VL,
        name="qwen2.5-vl-3b",
        summary="Qwen2.5-VL 3B: an image token for each 28 x 28 pixels, 36 layers of width 2048",
        hub_id="Qwen/Qwen2.5-VL-3B-Instruct",
        config=_config("qwen2_5_vl", hidden=2048, mlp=11008, layers=36, heads=16, kv_heads=2, vocab=151936, tied=True),
        prefix_tokens=_PREFIX_TOKENS,
    ),
    ModelEntry(
        family=QWEN2_5_VL,
        name="qwen2.5-vl-7b",
        summary="Qwen2.5-VL 7B: an image token for each 28 x 28 pixels, 28 layers of width 3584",
        hub_id="Qwen/Qwen2.5-VL-7B-Instruct",
        config=_config("qwen2_5_vl", hidden=3584, mlp=18944, layers=28, heads=28, kv_heads=4, vocab=152064, tied=False),
        prefix_tokens=_PREFIX_TOKENS,
    ),
    ModelEntry(
        family=QWEN3_VL,
        name="qwen3-vl-2b",
        summary="Qwen3-VL 2B: an image token for each 32 x 32 pixels, 28 layers of width 2048",
        hub_id="Qwen/Qwen3-VL-2B-Instruct",
        config=_config("qwen3_vl", hidden=2048, mlp=6144, layers=28, heads=16, kv_heads=8, vocab=151936, tied=True),
        prefix_tokens=_PREFIX_TOKENS_3,
    ),
    ModelEntry(
        family=QWEN3_VL,
        name="qwen3-vl-4b",
        summary="Qwen3-VL 4B: an image token for each 32 x 32 pixels, 36 layers of width 2560",
        hub_id="Qwen/Qwen3-VL-4B-Instruct",
        config=_config("qwen3_vl", hidden=2560, mlp=9728, layers=36, heads=32, kv_heads=8, vocab=151936, tied=True),
        prefix_tokens=_PREFIX_TOKENS_3,
    ),
)
