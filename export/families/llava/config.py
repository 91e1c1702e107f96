"""The config.json of a LLaVA model: what it may say, what it leaves out, and the sizes that follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

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
_CLIP: Mapping[str, Any] = {
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
_SIGLIP: Mapping[str, Any] = {
    **_CLIP,
    "model_type": "siglip_vision_model",
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
_LLAMA: Mapping[str, Any] = {
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
_MISTRAL: Mapping[str, Any] = {
    **_LLAMA,
    "model_type": "mistral",
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": None,
}
_QWEN2: Mapping[str, Any] = {
    **_LLAMA,
    "model_type": "qwen2",
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
}
_TOWERS: Mapping[str, Mapping[str, Any]] = {part["model_type"]: part for part in (_CLIP, _SIGLIP)}
_DECODERS: Mapping[str, Mapping[str, Any]] = {part["model_type"]: part for part in (_LLAMA, _MISTRAL, _QWEN2)}
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
    **_CLIP,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
# The same of LLaVA-OneVision: the first 26 layers of SigLIP's shape-optimised tower.
SIGLIP_WHEN_ABSENT: Mapping[str, Any] = {
    **_SIGLIP,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
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


@dataclass(frozen=True)
class Kind:
    """What a config.json of one `model_type` may say: its towers and decoders, and what it leaves out.

    `decoders` are types of text config, of which the first is meant where none is named; `top` are the defaults of keys
    outside all sections.
    """

    model_type: str
    called: str
    when_absent: Mapping[str, Any]
    decoders: tuple[str, ...]
    strategy: str
    top: Mapping[str, Any]

    @property
    def tower(self) -> str:
        """The type of its tower."""
        named: str = self.when_absent["model_type"]
        return named


LLAVA_KIND = Kind("llava", "LLaVA-1.5", VISION_WHEN_ABSENT, ("llama",), "default", _LLAVA_DEFAULTS)
NEXT_KIND = Kind(
    "llava_next",
    "LLaVA-NeXT",
    VISION_WHEN_ABSENT,
    ("llama", "mistral"),
    "default",
    {
        **_LLAVA_DEFAULTS,
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    },
)
ONEVISION_KIND = Kind(
    "llava_onevision",
    "LLaVA-OneVision",
    SIGLIP_WHEN_ABSENT,
    ("qwen2",),
    "full",
    {
        **_LLAVA_DEFAULTS,
        "image_token_index": 151646,
        "video_token_index": 151647,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    },
)


def _one_of(what: str, got: object, allowed: tuple[str, ...], called: str = "LLaVA-1.5") -> str:
    remedy = f"give a checkpoint of the {called} family in Hugging Face's layout"
    return one_of(f"config.json: {what}", got, allowed, remedy)


@dataclass(frozen=True)
class VisionGeometry:
    """The tower of CLIP, or without a `class_token` SigLIP's: sizes in channels, pixels and layers."""

    hidden: int
    layers: int
    heads: int
    mlp: int
    image_size: int
    patch_size: int
    channels: int
    norm_eps: float
    activation: str
    class_token: bool = True

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
        one_of(
            "config.json: vision_config.hidden_act",
            self.activation,
            ("quick_gelu", "gelu", "gelu_pytorch_tanh"),
            "give a checkpoint whose tower is built like that",
        )
        number("config.json: vision_config.layer_norm_eps", self.norm_eps, above=0, below=1)

    @classmethod
    def from_section(cls, vision: Mapping[str, Any], *, class_token: bool) -> Self:
        """Reads a whole vision_config, whose defaults are filled in."""
        return cls(
            hidden=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp=vision["intermediate_size"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            channels=vision["num_channels"],
            norm_eps=vision["layer_norm_eps"],
            activation=vision["hidden_act"],
            class_token=class_token,
        )

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


@dataclass(frozen=True, kw_only=True)
class PlainGeometry:
    """The sizes of a model that sees a photo as one square; `merge` x `merge` patches of it are an image token."""

    vision: VisionGeometry
    text: TextGeometry
    image_token_id: int
    tied_embeddings: bool
    merge: int = 1

    def __post_init__(self) -> None:
        rows, columns = self.vision.grid
        if rows % self.merge or columns % self.merge:
            raise CheckpointError(
                f"config.json: {rows} x {columns} patches cannot be merged {self.merge} x {self.merge}; "
                "download the file again"
            )
        if self.text.max_positions <= self.image_tokens:
            raise CheckpointError(
                f"config.json: text_config.max_position_embeddings={self.text.max_positions} leaves no room for text "
                f"beside {self.image_tokens} image tokens; correct it or download the file again"
            )

    @property
    def overview(self) -> tuple[int, int] | None:
        """None: a photo is seen as a whole alone."""
        return None

    @property
    def grid(self) -> tuple[int, int]:
        """Image tokens as (rows, columns)."""
        rows, columns = self.vision.grid
        return rows // self.merge, columns // self.merge

    @property
    def joined(self) -> int:
        """Channels that the projector takes: those of an image token's patches side by side."""
        return self.vision.hidden * self.merge**2

    @property
    def least_cut(self) -> int:
        """0: the decoder is given the projector's features alone."""
        return 0

    @property
    def image_tokens(self) -> int:
        """Image tokens before pruning."""
        rows, columns = self.grid
        return rows * columns

    @property
    def pixel_values(self) -> tuple[int, ...]:
        """(1, channels, height, width) of what the tower takes."""
        return 1, self.vision.channels, self.vision.image_size, self.vision.image_size

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


@dataclass(frozen=True)
class LlavaGeometry(PlainGeometry):
    """All sizes of one LLaVA model; `tower_layers` of the tower's layers run before its output is projected."""

    tower_layers: int
    projector_activation: str
    projector_bias: bool
    # Whether tokens end the rows of an image.
    newline: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.tower_layers <= self.vision.layers:
            raise CheckpointError(
                f"config.json: vision_feature_layer asks for the output of layer {self.tower_layers} of a tower of "
                f"{self.vision.layers} layers; allowed 1..{self.vision.layers} or -1..-{self.vision.layers}"
            )
        _one_of("projector_hidden_act", self.projector_activation, ("gelu",))
        super().__post_init__()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], kind: Kind = LLAVA_KIND, **more: Any) -> Self:
        """The geometry that a config.json of the `kind` describes, with `more` fields of a class that has more.

        CheckpointError when it is no such file, or contradicts itself.
        """
        config = without_nulls(config)
        _refuse_other_layouts(config)
        _one_of("model_type", config.get("model_type"), (kind.model_type,), kind.called)
        # An empty section means the defaults of its class, an absent one the tower of the published model.
        defaults = _TOWERS[kind.tower] if "vision_config" in config else kind.when_absent
        vision = {**defaults, **section(config, "vision_config")}
        text = decoder_section(config, kind.decoders, kind.called)
        top = {**kind.top, **config}
        _one_of("vision_config.model_type", vision["model_type"], (kind.tower,), kind.called)
        _one_of("vision_feature_select_strategy", top["vision_feature_select_strategy"], (kind.strategy,), kind.called)
        positive("vision_config", num_hidden_layers=vision["num_hidden_layers"])
        feature_layer = top["vision_feature_layer"]
        if isinstance(feature_layer, list) and len(feature_layer) == 1:  # the same features, by transformers' rules
            feature_layer = feature_layer[0]
        if type(feature_layer) is not int:
            raise CheckpointError(
                f"config.json: vision_feature_layer={shown(feature_layer)}; one layer number is supported, "
                "as in LLaVA-1.5"
            )
        geometry = cls(
            vision=VisionGeometry.from_section(vision, class_token=kind.tower == "clip_vision_model"),
            text=decoder_geometry(text),
            # Hugging Face counts hidden states from the embeddings, so index i is the output of the i-th layer.
            tower_layers=feature_layer if feature_layer >= 0 else vision["num_hidden_layers"] + 1 + feature_layer,
            projector_activation=top["projector_hidden_act"],
            projector_bias=flag("config.json: multimodal_projector_bias", top["multimodal_projector_bias"]),
            image_token_id=whole(
                "config.json: image_token_index", top.get("image_token_id", top["image_token_index"]), 0, _LARGEST_ID
            ),
            tied_embeddings=ties_embeddings(top, text),
            **more,
        )
        promised = config.get("image_seq_length")
        if promised is not None and (type(promised) is not int or promised != geometry.vision.tokens):
            rows, columns = geometry.vision.grid
            raise CheckpointError(
                f"config.json: image_seq_length={shown(promised)}, but {geometry.vision.image_size} pixels in patches "
                f"of {geometry.vision.patch_size} make {rows} x {columns} = {geometry.vision.tokens} image tokens"
            )
        return geometry


def decoder_section(config: Mapping[str, Any], decoders: tuple[str, ...], called: str) -> dict[str, Any]:
    """The text_config of a config.json without nulls, its defaults filled in.

    CheckpointError for others than the `decoders`, and for weights that are quantised.
    """
    given = section(config, "text_config")
    refuse_quantised(config, section(config, "vision_config"), given)
    named = _one_of("text_config.model_type", given.get("model_type", decoders[0]), decoders, called)
    return {**_DECODERS[named], **given}


def ties_embeddings(top: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """Whether the embedding is the output matrix, too: by the keys outside all sections, or by a `decoder_section`."""
    return flag("config.json: tie_word_embeddings", top["tie_word_embeddings"]) | flag(
        "config.json: text_config.tie_word_embeddings", text["tie_word_embeddings"]
    )


def decoder_geometry(text: Mapping[str, Any]) -> TextGeometry:
    """The sizes that a `decoder_section` says; CheckpointError for layers that see a window alone."""
    _refuse_windows(text)
    positive("text_config", hidden_size=text["hidden_size"], num_attention_heads=text["num_attention_heads"])
    # Qwen2's and Mistral's biases are what they are, whatever a file says.
    llama = text["model_type"] == "llama"
    attention_bias = llama and flag("config.json: text_config.attention_bias", text["attention_bias"])
    mlp_bias = llama and flag("config.json: text_config.mlp_bias", text["mlp_bias"])
    return TextGeometry(
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
        qkv_bias=attention_bias or text["model_type"] == "qwen2",
        out_bias=attention_bias,
        mlp_bias=mlp_bias,
        rope=Rope.from_text_config(text),
    )


def decisive_part(config: Mapping[str, Any], kind: Kind = LLAVA_KIND) -> dict[str, Any]:
    """Copies from a config.json what decides about the model's arithmetic, and none of what else such files hold."""
    return decisive(config, (*kind.top, "image_token_id", "image_seq_length"), _TOWERS[kind.tower], kind.decoders[0])


def decisive(config: Mapping[str, Any], top: Iterable[str], tower: Iterable[str], decoder: str) -> dict[str, Any]:
    """The same by the keys outside all sections and those of vision_config; of text_config by the decoder's type.

    `decoder` is the type of a text_config that names none.
    """
    config = without_nulls(config)
    text = (*_DECODERS[section(config, "text_config").get("model_type", decoder)], *_ROPE_KEYS)
    part = {key: config[key] for key in top if key in config}
    for name, keys in (("vision_config", tuple(tower)), ("text_config", text)):
        if name in config:
            part[name] = {key: value for key, value in section(config, name).items() if key in keys}
    return part


def _refuse_windows(text: Mapping[str, Any]) -> None:
    """Refuses a decoder whose layers see a part of the text alone."""
    windowed = "use_sliding_window" in text and flag(
        "config.json: text_config.use_sliding_window", text["use_sliding_window"]
    )
    if windowed or (text["model_type"] == "mistral" and text["sliding_window"] is not None):
        key = "use_sliding_window" if windowed else "sliding_window"
        raise CheckpointError(
            f"config.json: text_config.{key}={shown(text[key])}; a decoder whose layers see a window of the text alone "
            "is not supported: give a checkpoint whose layers all see everything"
        )


def _refuse_other_layouts(config: Mapping[str, Any]) -> None:
    flat = ("hidden_size",) if "text_config" not in config else ()
    authors = [key for key in (*_AUTHORS_KEYS, *flat) if key in config]
    if authors or str(config.get("model_type")).startswith("llava_ll"):
        key = authors[0] if authors else "model_type"
        raise CheckpointError(
            f"config.json: {key}={shown(config[key])} is the authors' own layout, whose files hold no vision tower; "
            "give the converted checkpoint, as under llava-hf on the hub"
        )


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
