"""A family of the tests' own, unlike LLaVA-1.5 wherever that is possible: a wide image, rotary positions in the tower,
names of its own in the files, grouped queries, and biases on q, k and v alone. transformers runs it as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.blocks.decoder_layer import DecoderLayer
from export.blocks.geometry import Rope, TextGeometry
from export.blocks.norms import RmsNorm
from export.blocks.projector import Projector
from export.families.desktop import filled
from export.families.family import Checkpoint, Frame, ModelEntry, Seen, TensorEntry, decoder_tensors, linear
from runtime.bundle import ImageInfo
from runtime.errors import ExportError, RequestError

CONFIG: Mapping[str, Any] = {
    "model_type": "llava",
    "image_token_index": 5,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": [48, 80],
        "patch_size": 16,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": 96,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
    },
}
# How transformers' tower calls what the blocks call otherwise.
_TOWER_NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn": "attention",
    "post_attention_layernorm": "ffn_norm",
    "mlp": "feed_forward",
}
_PIXELS: Mapping[str, Any] = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


@dataclass(frozen=True)
class WideGeometry:
    """The sizes; the tower's layers are those of a decoder that sees everything."""

    text: TextGeometry
    tower: TextGeometry
    image_size: tuple[int, int]
    patch: int
    image_token_id: int
    overview = None

    @property
    def pixel_values(self) -> tuple[int, ...]:
        return 1, 3, *self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        height, width = self.image_size
        return height // self.patch, width // self.patch

    @property
    def least_cut(self) -> int:
        return 0

    @property
    def image_tokens(self) -> int:
        rows, columns = self.grid
        return rows * columns

    def numbers(self) -> Mapping[str, object]:
        return {"image size": self.image_size, "text hidden": self.text.hidden, "text layers": self.text.layers}


def _layers(config: Mapping[str, Any], *, kv_heads: int, vocab: int, positions: int, biased: bool) -> TextGeometry:
    return TextGeometry(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=kv_heads,
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        mlp=config["intermediate_size"],
        vocab=vocab,
        max_positions=positions,
        norm_eps=config.get("rms_norm_eps", 1e-5),
        activation="silu",
        qkv_bias=biased,
        out_bias=False,
        mlp_bias=False,
        rope=Rope(theta=config["rope_parameters"]["rope_theta"]),
    )


class WideTower(nn.Module):
    """Patches, a norm, layers that see everything, the projector; positions are (row, column)."""

    cos: Tensor
    sin: Tensor
    open: Tensor

    def __init__(self, geometry: WideGeometry) -> None:
        super().__init__()
        tower = geometry.tower
        self.patch_conv = nn.Conv2d(3, tower.hidden, geometry.patch, stride=geometry.patch, bias=False, device="meta")
        self.ln_pre = RmsNorm(tower.hidden, tower.norm_eps)
        self.layers = nn.ModuleList(DecoderLayer(tower) for _ in range(tower.layers))
        self.projector = Projector(width=tower.hidden, out=geometry.text.hidden, activation="gelu", bias=False)
        y, x = (axis.reshape(-1, 1) for axis in torch.meshgrid(*map(torch.arange, geometry.grid), indexing="ij"))
        frequencies = 1.0 / (tower.rope.theta ** (torch.arange(0, tower.head_dim, 2).float() / tower.head_dim))
        angles = torch.cat([y * frequencies[0::2], x * frequencies[1::2]], dim=1)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], dim=1), persistent=False)
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], dim=1), persistent=False)
        self.register_buffer("open", torch.zeros(geometry.image_tokens, geometry.image_tokens), persistent=False)

    def forward(self, pixel_values: Tensor) -> Seen:
        """(1, 3, H, W) -> Seen"""
        patches = self.patch_conv(pixel_values)
        hidden = self.ln_pre(patches.reshape(1, patches.shape[1], -1).permute(0, 2, 1))
        keys = hidden
        for layer in self.layers:
            out = layer(hidden, self.cos, self.sin, self.open)
            hidden, keys = out.hidden, out.key
        return Seen(self.projector(hidden), keys.permute(1, 0, 2).reshape(1, hidden.shape[1], -1))


class WideDesktop:
    """The same by transformers' Pixtral and Qwen2 modules."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str) -> None:
        from transformers import LlavaConfig
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

        self._checkpoint, self._device = checkpoint, device
        config: Any = LlavaConfig.from_dict(dict(checkpoint.config))
        config.vision_config._attn_implementation = config.text_config._attn_implementation = "eager"
        self._config = config
        self._rotary = Qwen2RotaryEmbedding(config.text_config).to(device)

    def pixels(self, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(height, width, 3) -> (1, 3, H, W)"""
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        height, width = self._checkpoint.geometry.pixel_values[2:]
        made = CLIPImageProcessorPil(**_PIXELS, size={"height": height, "width": width}, do_center_crop=False)
        prepared = made(photo, input_data_format="channels_last", return_tensors="np")
        return np.asarray(prepared["pixel_values"], dtype=np.float32)

    def see(self, pixel_values: Tensor) -> Seen:
        """(1, 3, H, W) -> Seen"""
        from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
        from transformers.models.pixtral.modeling_pixtral import PixtralVisionModel, apply_rotary_pos_emb

        tower: Any = self._filled(PixtralVisionModel(self._config.vision_config), _canonical_in_tower)
        seen: dict[str, Any] = {}
        last = tower.transformer.layers[-1].attention
        last.k_proj.register_forward_hook(lambda module, inputs, output: seen.update(keys=output))
        tower.patch_positional_embedding.register_forward_hook(lambda module, inputs, output: seen.update(rope=output))
        hidden = tower(pixel_values).last_hidden_state
        keys = seen["keys"].view(1, hidden.shape[1], last.num_heads, last.head_dim).transpose(1, 2)
        keys, _ = apply_rotary_pos_emb(keys, keys, *seen["rope"], unsqueeze_dim=0)
        projector = self._filled(LlavaMultiModalProjector(self._config), lambda name: f"tower.projector.{name}")
        return Seen(projector(hidden), keys.transpose(1, 2).reshape(1, hidden.shape[1], -1))

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for hidden (1, T, D) at positions (1, T)."""
        tables: tuple[Tensor, Tensor] = self._rotary(hidden, position_ids=positions)
        return tables

    def layer(self, index: int) -> nn.Module:
        """A decoder layer."""
        from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

        return self._filled(Qwen2DecoderLayer(self._config.text_config, index), lambda name: f"layers.{index}.{name}")

    def norm(self) -> nn.Module:
        """The norm in front of the output matrix."""
        from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

        config = self._config.text_config
        return self._filled(Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps), lambda name: f"norm.{name}")

    def _filled(self, module: nn.Module, canonical: Any) -> nn.Module:
        return filled(module, self._checkpoint, self._device, canonical)


def _canonical_in_tower(name: str) -> str:
    """`transformer.layers.0.feed_forward...` -> `tower.layers.0.mlp...`"""
    for ours, theirs in _TOWER_NAMES.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return f"tower.{name.removeprefix('transformer.')}"


def _stored(name: str) -> str:
    if name.startswith("tower.projector."):
        return name.replace("tower.projector.", "model.multi_modal_projector.", 1)
    if not name.startswith("tower."):
        return name if name.startswith("lm_head.") else f"model.language_model.{name}"
    for ours, theirs in _TOWER_NAMES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    path = name.removeprefix("tower.")
    return f"model.vision_tower.{'transformer.' if path.startswith('layers.') else ''}{path}"


class Wide:
    """The family."""

    name = "wide"
    model_type = "llava"
    class_token = False
    image_marks = "", ""
    backends = None
    drop_in = False

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        return (TINY_WIDE,)

    def resized(self, size: tuple[int, int]) -> Wide:
        raise RequestError("the wide family has one size")

    def whole_config(self, folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
        return config

    def geometry(self, config: Mapping[str, Any]) -> WideGeometry:
        vision, text = config["vision_config"], config["text_config"]
        height, width = vision["image_size"]
        return WideGeometry(
            text=_layers(
                text,
                kv_heads=text["num_key_value_heads"],
                vocab=text["vocab_size"],
                positions=text["max_position_embeddings"],
                biased=True,
            ),
            tower=_layers(vision, kv_heads=vision["num_attention_heads"], vocab=1, positions=1, biased=False),
            image_size=(height, width),
            patch=vision["patch_size"],
            image_token_id=config["image_token_index"],
        )

    def tensors(self, geometry: WideGeometry) -> Mapping[str, TensorEntry]:
        shapes = (*_tower_tensors(geometry), *decoder_tensors(geometry.text))
        return {name: TensorEntry(shape, (_stored(name),)) for name, shape in shapes}

    def stray(self, stored: str) -> str | None:
        return "no such tensor is known" if stored.startswith(("model.", "lm_head.")) else None

    def other_layout(self, stored: Sequence[str]) -> str | None:
        return None

    def image(self, folder: Path | None, geometry: WideGeometry) -> ImageInfo:
        height, width = geometry.image_size
        size = {"height": height, "width": width}
        return ImageInfo.from_preprocessor({**_PIXELS, "size": size, "do_center_crop": False})

    def frame(self, prefix_ids: Sequence[int], geometry: WideGeometry) -> Frame:
        return Frame.of_one_image(prefix_ids, geometry.image_token_id, geometry.grid)

    def tower(self, geometry: WideGeometry) -> nn.Module:
        return WideTower(geometry)

    def layer(self, geometry: WideGeometry) -> DecoderLayer:
        return DecoderLayer(geometry.text)

    def desktop(self, checkpoint: Checkpoint, device: torch.device | str) -> WideDesktop:
        return WideDesktop(checkpoint, device)

    def hub_files(self, checkpoint: Checkpoint, *, image_token: str, keep: int) -> dict[str, dict[str, Any]]:
        raise ExportError("no Hugging Face runtime takes a pruned image of the wide family; leave --layout out")


def _tower_tensors(geometry: WideGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    tower = geometry.tower
    yield "tower.patch_conv.weight", (tower.hidden, 3, geometry.patch, geometry.patch)
    yield "tower.ln_pre.weight", (tower.hidden,)
    for name, shape in decoder_tensors(tower):
        if name.startswith("layers."):
            yield f"tower.{name}", shape
    yield from linear("tower.projector.linear_1", tower.hidden, geometry.text.hidden, bias=False)
    yield from linear("tower.projector.linear_2", geometry.text.hidden, geometry.text.hidden, bias=False)


WIDE = Wide()
TINY_WIDE = ModelEntry(
    name="tiny-wide",
    family=WIDE,
    summary="for tests",
    hub_id=None,
    config=CONFIG,
    prefix_tokens=5,
    precision="fp32",
    quant_text="none",
)
