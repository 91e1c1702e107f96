"""The config.json of a LLaVA-1.5 model: what it may say, what it leaves out, and the sizes that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.blocks.geometry import Rope, TextGeometry
from export.settings import (
    flag,
    number,
    one_of,
    positive,
    read_object,
    refuse_quantised,
    section,
    shown,
    whole,
    without_nulls,
)
from runtime.errors import CheckpointError

# What Hugging Face's config classes assume for a key that config.json leaves out (llava-hf's files leave out most).
_VISION_DEFAULTS: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_TEXT_DEFAULTS: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
_LLAVA_DEFAULTS: Mapping[str, Any] = {
    "model_type": None,
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}
# A config.json with no vision_config at all means the tower that LLaVA-1.5 was published with.
VISION_WHEN_ABSENT: Mapping[str, Any] = {
    **_VISION_DEFAULTS,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


_LARGEST_ID = 2**31 - 1
# Keys of the layout that LLaVA's authors publish; no config.json of Hugging Face's layout has one.
_AUTHORS_KEYS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size", "tune_mm_mlp_adapter")
# What decides about the rotary embedding, in the spelling of any version.
_ROPE_KEYS = (
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
    "partial_rotary_factor",
)
# What LLaVA's authors put in place of the image token; it is no row of the vocabulary.
_AUTHORS_IMAGE_INDEX = -200
_IMAGE_TOKEN = "<image>"


def _one_of(what: str, got: object, allowed: tuple[str, ...]) -> str:
    remedy = "give a checkpoint of the LLaVA-1.5 family in Hugging Face's layout"
    return one_of(f"config.json: {what}", got, allowed, remedy)


@dataclass(frozen=True)
class VisionGeometry:
    """The CLIP tower: sizes in channels, pixels and layers."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    image_size: int
    patch_size: int
    channels: int
    norm_eps: float
    activation: str

    def __post_init__(self) -> None:
        positive(
            "vision_config",
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.mlp,
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.channels,
        )
        if self.hidden % self.heads:
            raise CheckpointError(
                f"config.json: vision_config.hidden_size={self.hidden} is not a multiple of "
                f"num_attention_heads={self.heads}"
            )
        if self.image_size < self.patch_size:
            raise CheckpointError(
                f"config.json: vision_config.image_size={self.image_size} is smaller than patch_size={self.patch_size}"
            )
        if self.channels != 3:
            raise CheckpointError(
                f"config.json: vision_config.num_channels={self.channels}; only RGB (3) images are supported"
            )
        _one_of("vision_config.hidden_act", self.activation, ("quick_gelu", "gelu"))
        number("config.json: vision_config.layer_norm_eps", self.norm_eps, above=0, below=1)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns); pixels past the last whole patch are never seen, as in the original."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """Patch tokens, without the class token."""
        rows, columns = self.grid
        return rows * columns


@dataclass(frozen=True)
class LlavaGeometry:
    """All sizes of one LLaVA model; `tower_layers` of the tower's layers run before its output is projected."""

    vision: VisionGeometry
    text: TextGeometry
    tower_layers: int
    projector_activation: str
    projector_bias: bool
    image_token_id: int
    tied_embeddings: bool

    def __post_init__(self) -> None:
        if not 1 <= self.tower_layers <= self.vision.layers:
            raise CheckpointError(
                f"config.json: vision_feature_layer asks for the output of layer {self.tower_layers} of a tower of "
                f"{self.vision.layers} layers; allowed 1..{self.vision.layers} or -1..-{self.vision.layers}"
            )
        _one_of("projector_hidden_act", self.projector_activation, ("gelu",))
        if self.text.max_positions <= self.image_tokens:
            raise CheckpointError(
                f"config.json: text_config.max_position_embeddings={self.text.max_positions} leaves no room for text "
                f"beside {self.image_tokens} image tokens; correct it or download the file again"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens as (rows, columns)."""
        return self.vision.grid

    @property
    def least_cut(self) -> int:
        """0: the decoder is given the projector's features alone."""
        return 0

    @property
    def image_tokens(self) -> int:
        """Image tokens before pruning."""
        return self.vision.tokens

    @property
    def pixel_values(self) -> tuple[int, ...]:
        """(1, channels, height, width) of what the tower takes."""
        return 1, self.vision.channels, self.vision.image_size, self.vision.image_size

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LlavaGeometry:
        """The geometry a LLaVA config.json describes; CheckpointError when it is not one, or contradicts itself."""
        config = without_nulls(config)
        _refuse_other_layouts(config)
        _one_of("model_type", config.get("model_type"), ("llava",))
        # An empty section means the defaults of its class, an absent one the tower of the published LLaVA-1.5.
        defaults = _VISION_DEFAULTS if "vision_config" in config else VISION_WHEN_ABSENT
        vision = {**defaults, **section(config, "vision_config")}
        text = {**_TEXT_DEFAULTS, **section(config, "text_config")}
        top = {**_LLAVA_DEFAULTS, **config}
        _one_of("vision_config.model_type", vision["model_type"], ("clip_vision_model",))
        _one_of("text_config.model_type", text["model_type"], ("llama",))
        _one_of("vision_feature_select_strategy", top["vision_feature_select_strategy"], ("default",))
        positive("text_config", hidden_size=text["hidden_size"], num_attention_heads=text["num_attention_heads"])
        positive("vision_config", num_hidden_layers=vision["num_hidden_layers"])
        feature_layer = top["vision_feature_layer"]
        if isinstance(feature_layer, list) and len(feature_layer) == 1:  # the same features, by transformers' rules
            feature_layer = feature_layer[0]
        if type(feature_layer) is not int:
            raise CheckpointError(
                f"config.json: vision_feature_layer={shown(feature_layer)}; one layer number is supported, "
                "as in LLaVA-1.5"
            )
        attention_bias = flag("config.json: text_config.attention_bias", text["attention_bias"])
        geometry = cls(
            vision=VisionGeometry(
                hidden=vision["hidden_size"],
                layers=vision["num_hidden_layers"],
                heads=vision["num_attention_heads"],
                mlp=vision["intermediate_size"],
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                channels=vision["num_channels"],
                norm_eps=vision["layer_norm_eps"],
                activation=vision["hidden_act"],
            ),
            text=TextGeometry(
                hidden=text["hidden_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                kv_heads=_or(text["num_key_value_heads"], text["num_attention_heads"]),
                head_dim=_or(text["head_dim"], text["hidden_size"] // text["num_attention_heads"]),
                mlp=text["intermediate_size"],
                vocab=text["vocab_size"],
                max_positions=text["max_position_embeddings"],
                norm_eps=text["rms_norm_eps"],
                activation=text["hidden_act"],
                qkv_bias=attention_bias,
                out_bias=attention_bias,
                mlp_bias=flag("config.json: text_config.mlp_bias", text["mlp_bias"]),
                rope=Rope.from_text_config(text),
            ),
            # Hugging Face counts hidden states from the embeddings, so index i is the output of the i-th layer.
            tower_layers=feature_layer if feature_layer >= 0 else vision["num_hidden_layers"] + 1 + feature_layer,
            projector_activation=top["projector_hidden_act"],
            projector_bias=flag("config.json: multimodal_projector_bias", top["multimodal_projector_bias"]),
            image_token_id=whole(
                "config.json: image_token_index", top.get("image_token_id", top["image_token_index"]), 0, _LARGEST_ID
            ),
            tied_embeddings=flag("config.json: tie_word_embeddings", top["tie_word_embeddings"])
            | flag("config.json: text_config.tie_word_embeddings", text["tie_word_embeddings"]),
        )
        promised = config.get("image_seq_length")
        if promised is not None and (type(promised) is not int or promised != geometry.image_tokens):
            rows, columns = geometry.grid
            raise CheckpointError(
                f"config.json: image_seq_length={shown(promised)}, but {geometry.vision.image_size} pixels in patches "
                f"of {geometry.vision.patch_size} make {rows} x {columns} = {geometry.image_tokens} image tokens"
            )
        return geometry

    def numbers(self) -> dict[str, object]:
        """The numbers by which one model of the family is told from another."""
        return {
            "vision hidden": self.vision.hidden,
            "vision layers": self.vision.layers,
            "vision heads": self.vision.heads,
            "vision MLP": self.vision.mlp,
            "image size": self.vision.image_size,
            "patch size": self.vision.patch_size,
            "text hidden": self.text.hidden,
            "text layers": self.text.layers,
            "text heads": self.text.heads,
            "text KV heads": self.text.kv_heads,
            "text MLP": self.text.mlp,
        }


def decisive_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copies from a config.json what decides about the model's arithmetic, and none of what else such files hold."""
    config = without_nulls(config)
    part = {key: config[key] for key in (*_LLAVA_DEFAULTS, "image_token_id", "image_seq_length") if key in config}
    for name, keys in (("vision_config", _VISION_DEFAULTS), ("text_config", (*_TEXT_DEFAULTS, *_ROPE_KEYS))):
        if name in config:
            part[name] = {key: value for key, value in section(config, name).items() if key in keys}
    return part


def _refuse_other_layouts(config: Mapping[str, Any]) -> None:
    flat = ("hidden_size",) if "text_config" not in config else ()
    authors = [key for key in (*_AUTHORS_KEYS, *flat) if key in config]
    if authors or str(config.get("model_type")).startswith("llava_ll"):
        key = authors[0] if authors else "model_type"
        raise CheckpointError(
            f"config.json: {key}={shown(config[key])} is the authors' own layout, whose files hold no vision tower; "
            "give the converted checkpoint, as under llava-hf on the hub"
        )
    refuse_quantised(config, section(config, "vision_config"), section(config, "text_config"))


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def with_image_token(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Completes `config` with the image token's id, asked of the tokenizer where config.json does not say it.

    Nothing is changed where the tokenizer does not know either: Hugging Face's default counts then.
    """
    keys = [key for key in ("image_token_id", "image_token_index") if key in config]  # the first one counts
    if keys and config[keys[0]] != _AUTHORS_IMAGE_INDEX:
        return config
    added = (read_object(folder / "tokenizer.json") or {}).get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids = {token.get("id") for token in tokens if token.get("content") == _IMAGE_TOKEN}
    if len(ids) == 1:
        rest = {key: value for key, value in config.items() if key not in keys}
        return {**rest, "image_token_index": ids.pop()}
    if keys:
        raise CheckpointError(
            f"config.json: {keys[0]}={_AUTHORS_IMAGE_INDEX} is the mark of LLaVA's authors and no id, and "
            f"tokenizer.json has no token {_IMAGE_TOKEN!r}; set {keys[0]} to the id that the image has in the prompt"
        )
    return config
