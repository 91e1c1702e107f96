"""The config.json of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model: what it may say, and the sizes for one image size."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from export.blocks.geometry import Rope, TextGeometry
from export.settings import (
    flag,
    number,
    one_of,
    positive,
    refuse_quantised,
    section,
    shown,
    whole,
    without_nulls,
)
from runtime.errors import CheckpointError, RequestError

Version = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

# What Hugging Face's config classes assume for a key that config.json leaves out.
_VISION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_vl": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 3584,
        "hidden_act": "quick_gelu",
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "rope_parameters": None,
    },
    "qwen2_5_vl": {
        "depth": 32,
        "hidden_size": 3584,
        "hidden_act": "silu",
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "rope_parameters": None,
    },
    "qwen3_vl": {
        "depth": 27,
        "hidden_size": 1152,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 4304,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": 3584,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
        "rope_parameters": None,
    },
}
_QWEN2_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
_TEXT_DEFAULTS: Mapping[Version, Mapping[str, Any]] = {
    "qwen2_vl": _QWEN2_DEFAULTS,
    "qwen2_5_vl": _QWEN2_DEFAULTS,
    "qwen3_vl": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
}
_TOP_DEFAULTS: Mapping[str, Any] = {"image_token_id": 151655, "tie_word_embeddings": False}
# transformers reads these beside them; none changes what is computed for one photo.
_TOP_KEYS = ("video_token_id", "vision_start_token_id", "vision_end_token_id")
# Nor do these; it warns where it has to guess them.
_TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "original_max_position_embeddings")
_OF_SECTIONS = ("mrope_section", "mrope_interleaved")
# Sections and base frequency of the decoder's rotary embedding where a file has none.
_DEFAULT_ROPE: Mapping[Version, tuple[list[int], float]] = {
    "qwen2_vl": ([16, 24, 24], 1e6),
    "qwen2_5_vl": ([16, 24, 24], 1e6),
    "qwen3_vl": ([24, 20, 20], 5e5),
}
_TOWER_THETA = 1e4
_LARGEST_ID = 2**31 - 1
# The norms of the tower; no config.json says it.
TOWER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class TowerGeometry:
    """The vision tower: sizes in channels, pixels and layers.

    `merge` x `merge` patches become one image token. `full_layers` see all patches, the others windows of `window` x
    `window` image tokens; None where all layers see everything. `gated` layers have RMS norms and gated MLPs. Positions
    learnt for `table` x `table` patches are stretched over those that there are; None where none are learnt. What comes
    out of each of the `planes` layers is merged for a decoder layer of its own (`Seen.planes`).
    """

    hidden: int
    layers: int
    heads: int
    mlp: int
    out: int
    patch_size: int
    merge: int
    frames: int
    channels: int
    activation: str
    gated: bool
    theta: float
    window: int | None = None
    full_layers: tuple[int, ...] | None = None
    patch_bias: bool = False
    table: int | None = None
    planes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        positive(
            "vision_config",
            hidden_size=self.hidden,
            depth=self.layers,
            num_heads=self.heads,
            intermediate_size=self.mlp,
            patch_size=self.patch_size,
            spatial_merge_size=self.merge,
            temporal_patch_size=self.frames,
            in_channels=self.channels,
        )
        if self.hidden % (4 * self.heads):
            raise CheckpointError(
                f"config.json: vision_config: {self.hidden} channels in {self.heads} heads do not divide by 4, as "
                "rotary positions of two axes need; download the file again"
            )
        if self.channels != 3:
            raise CheckpointError(
                f"config.json: vision_config.in_channels={self.channels}; only RGB (3) images are supported"
            )
        for name, layers in (
            ("fullatt_block_indexes", self.full_layers or ()),
            ("deepstack_visual_indexes", self.planes),
        ):
            if any(not 0 <= index < self.layers for index in layers):
                raise CheckpointError(
                    f"config.json: vision_config.{name}={list(layers)} names layers beyond the {self.layers} that "
                    "there are; download the file again"
                )
        if list(self.planes) != sorted(set(self.planes)):
            raise CheckpointError(
                f"config.json: vision_config.deepstack_visual_indexes={list(self.planes)} must ascend: the first "
                "merger belongs to the first of these layers; download the file again"
            )

    @property
    def step(self) -> int:
        """Pixels of an image token's edge."""
        return self.patch_size * self.merge

    def windows(self, layer: int, grid: tuple[int, int]) -> int:
        """In how many windows a layer sees image tokens of (rows, columns)."""
        if self.window is None or (self.full_layers is not None and layer in self.full_layers):
            return 1
        return grid[0] * grid[1] // self.window**2


@dataclass(frozen=True)
class QwenGeometry:
    """All sizes of one model at one size of image, (height, width) in pixels."""

    version: Version
    tower: TowerGeometry
    text: TextGeometry
    image_size: tuple[int, int]
    image_token_id: int
    tied_embeddings: bool
    overview = None

    def __post_init__(self) -> None:
        if self.tower.out != self.text.hidden:
            raise CheckpointError(
                f"config.json: the tower gives {self.tower.out} channels, but text_config.hidden_size is "
                f"{self.text.hidden}; download the file again"
            )
        if len(self.tower.planes) >= self.text.layers:
            raise CheckpointError(
                f"config.json: vision_config.deepstack_visual_indexes={list(self.tower.planes)} makes features for "
                f"{len(self.tower.planes)} decoder layers, and there are {self.text.layers}: none is left to prune in "
                "front of"
            )
        step = self.tower.step * (self.tower.window or 1)
        if any(edge < step or edge % step for edge in self.image_size):
            what = "a window of the tower" if self.tower.window else "an image token"
            height, width = self.image_size
            raise RequestError(
                f"images of {height} x {width} pixels do not divide into {what}, {step} x {step} pixels; "
                f"height and width must be multiples of {step}"
            )
        if self.text.max_positions <= self.image_tokens:
            raise CheckpointError(
                f"config.json: max_position_embeddings={self.text.max_positions} leaves no room for text beside "
                f"{self.image_tokens} image tokens; correct it or download the file again"
            )

    @property
    def pixel_values(self) -> tuple[int, ...]:
        """(1, channels, height, width) of what the tower takes: the photo itself, whose patches the graph makes."""
        return 1, self.tower.channels, *self.image_size

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens as (rows, columns), after patches are merged."""
        height, width = self.image_size
        return height // self.tower.step, width // self.tower.step

    @property
    def least_cut(self) -> int:
        """How many decoder layers the tower adds features behind, to all image tokens."""
        return len(self.tower.planes)

    @property
    def image_tokens(self) -> int:
        """Image tokens before pruning."""
        rows, columns = self.grid
        return rows * columns

    def numbers(self) -> dict[str, object]:
        """The numbers by which one model of the family is told from another."""
        return {
            "vision hidden": self.tower.hidden,
            "vision layers": self.tower.layers,
            "vision heads": self.tower.heads,
            "vision MLP": self.tower.mlp,
            "patch size": self.tower.patch_size,
            "merged patches": self.tower.merge,
            "text hidden": self.text.hidden,
            "text layers": self.text.layers,
            "text heads": self.text.heads,
            "text KV heads": self.text.kv_heads,
            "text MLP": self.text.mlp,
            "vocabulary": self.text.vocab,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], version: Version, image_size: tuple[int, int]) -> QwenGeometry:
        """The geometry that a config.json describes at a size of image.

        CheckpointError when it is none of this version, or contradicts itself; RequestError for an image size that
        does not divide into image tokens.
        """
        config = without_nulls(config)
        _one_of("model_type", config.get("model_type"), (version,))
        refuse_quantised(config, section(config, "vision_config"), text_section(config))
        vision = {**_VISION_DEFAULTS[version], **section(config, "vision_config")}
        text = {**_TEXT_DEFAULTS[version], **text_section(config)}
        top = {**_TOP_DEFAULTS, **config}
        positive("text_config", hidden_size=text["hidden_size"], num_attention_heads=text["num_attention_heads"])
        if flag("config.json: use_sliding_window", text.get("use_sliding_window", False)):
            raise CheckpointError(
                "config.json: use_sliding_window=true; a decoder whose layers see a window of the text alone is not "
                "supported: set it to false, as in the published models"
            )
        third = version == "qwen3_vl"
        biased = third and flag("config.json: text_config.attention_bias", text["attention_bias"])
        return cls(
            version=version,
            tower=_tower(vision, version),
            text=TextGeometry(
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                head_dim=text["head_dim"] if third else text["hidden_size"] // text["num_attention_heads"],
                mlp=text["intermediate_size"],
                vocab=text["vocab_size"],
                max_positions=text["max_position_embeddings"],
                norm_eps=text["rms_norm_eps"],
                activation=text["hidden_act"],
                qkv_bias=biased or not third,
                out_bias=biased,
                mlp_bias=False,
                rope=_rope(text, version),
                qk_norm=third,
            ),
            image_size=image_size,
            image_token_id=whole("config.json: image_token_id", top["image_token_id"], 0, _LARGEST_ID),
            tied_embeddings=flag("config.json: tie_word_embeddings", top["tie_word_embeddings"])
            | flag("config.json: text_config.tie_word_embeddings", text["tie_word_embeddings"]),
        )


def _tower(vision: Mapping[str, Any], version: Version) -> TowerGeometry:
    gated, first, third = version == "qwen2_5_vl", version == "qwen2_vl", version == "qwen3_vl"
    hidden = vision["embed_dim" if first else "hidden_size"]
    positive("vision_config", hidden_size=hidden, patch_size=vision["patch_size"], merge=vision["spatial_merge_size"])
    window = None
    if gated:
        step = vision["patch_size"] * vision["spatial_merge_size"]
        size = whole("config.json: vision_config.window_size", vision["window_size"], step, _LARGEST_ID)
        window = size // vision["spatial_merge_size"] // vision["patch_size"]
    given = vision["rope_parameters"] or {}
    if not isinstance(given, Mapping) or given.get("rope_type", "axial") != "axial":
        raise CheckpointError(
            f"config.json: vision_config.rope_parameters={shown(given)} are not understood; allowed: rope_type axial"
        )
    table = None
    if third:
        count = vision["num_position_embeddings"]
        positive("vision_config", num_position_embeddings=count)
        table = math.isqrt(count)
        if table**2 != count:
            raise CheckpointError(
                f"config.json: vision_config.num_position_embeddings={count} is no square of a whole number, as "
                "positions of rows and columns need; download the file again"
            )
    ratio = whole("config.json: vision_config.mlp_ratio", vision["mlp_ratio"], 1, 64) if first else 0
    return TowerGeometry(
        hidden=hidden,
        layers=vision["depth"],
        heads=vision["num_heads"],
        mlp=hidden * ratio if first else vision["intermediate_size"],
        out=vision["hidden_size" if first else "out_hidden_size"],
        patch_size=vision["patch_size"],
        merge=vision["spatial_merge_size"],
        frames=vision["temporal_patch_size"],
        channels=vision["in_channels"],
        activation=_one_of(
            "vision_config.hidden_act",
            vision["hidden_act"],
            ("silu",) if gated else ("gelu_pytorch_tanh" if third else "quick_gelu", "gelu"),
        ),
        gated=gated,
        theta=number("config.json: vision_config rope_theta", given.get("rope_theta", _TOWER_THETA), above=0),
        window=window,
        full_layers=_layers(vision, "fullatt_block_indexes") if gated else None,
        patch_bias=third,
        table=table,
        planes=_layers(vision, "deepstack_visual_indexes") if third else (),
    )


def _layers(vision: Mapping[str, Any], key: str) -> tuple[int, ...]:
    layers = vision[key]
    if not isinstance(layers, list) or any(type(index) is not int for index in layers):
        raise CheckpointError(f"config.json: vision_config.{key} must be a list of layers, got {shown(layers)}")
    return tuple(layers)


def _rope(text: Mapping[str, Any], version: Version) -> Rope:
    """The rotary embedding of the decoder; its sections stand beside its type, which older files call mrope."""
    default_sections, default_theta = _DEFAULT_ROPE[version]
    interleaved = version == "qwen3_vl"
    what = "config.json: text_config.rope_parameters"
    given = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(f"{what} must be an object, got {shown(given)}; download the file again")
    if flag(f"{what}.mrope_interleaved", given.get("mrope_interleaved", interleaved)) is not interleaved:
        raise CheckpointError(
            f"{what}.mrope_interleaved={json.dumps(not interleaved)} is not what {version} is built like; give a "
            "checkpoint of this family in Hugging Face's layout"
        )
    sections = given.get("mrope_section", default_sections)
    sound = isinstance(sections, list) and sections and all(type(size) is int and size > 0 for size in sections)
    if not sound or len(sections) != len(default_sections):
        raise CheckpointError(
            f"{what}.mrope_section must be three whole numbers from 1 on, for time, row and column, got "
            f"{shown(sections)}; download the file again"
        )
    kind = given.get("rope_type", given.get("type", "default"))
    plain = {key: value for key, value in given.items() if key not in (*_OF_SECTIONS, "type", "rope_type")}
    read = {"rope_theta": default_theta, **text, "rope_scaling": None}
    read["rope_parameters"] = {**plain, "rope_type": "default" if kind == "mrope" else kind}
    return replace(Rope.from_text_config(read), sections=tuple(sections), interleaved=interleaved)


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is said of the decoder: in a section of its own, or, in the files as published, beside everything else."""
    if "text_config" in config:
        return section(config, "text_config")
    return {key: value for key, value in config.items() if key != "vision_config"}


def decisive_part(config: Mapping[str, Any], version: Version) -> dict[str, Any]:
    """Copies from a config.json what decides about the model's arithmetic, and none of what else such files hold."""
    config = without_nulls(config)
    known = (*_TEXT_DEFAULTS[version], *_TEXT_IDS, *_ROPE_KEYS)
    text = {key: value for key, value in text_section(config).items() if key in known}
    vision = section(config, "vision_config")
    return {
        **{key: config[key] for key in (*_TOP_DEFAULTS, *_TOP_KEYS) if key in config},
        "vision_config": {key: value for key, value in vision.items() if key in _VISION_DEFAULTS[version]},
        "text_config": text,
    }


def _one_of(what: str, got: object, allowed: tuple[str, ...]) -> str:
    return one_of(f"config.json: {what}", got, allowed, "give a checkpoint of this family in Hugging Face's layout")
