"""The LLaVA-1.5 family: the geometry a config.json describes, the tensors it implies, and one entry per known model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from export.models.settings import flag, number, shown, without_nulls
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from export.checkpoints import Checkpoint
    from runtime.bundle import ImageInfo, PromptInfo

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
_VISION_WHEN_ABSENT: Mapping[str, Any] = {
    **_VISION_DEFAULTS,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


# Far above every published size, far below what would exhaust memory before anything else is noticed.
_LARGEST_SIZE = 2**24
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
# Where quantisers leave their mark; older compressed-tensors wrote the second.
_QUANTISED_KEYS = ("quantization_config", "compression_config")


def _positive(section: str, **sizes: object) -> None:
    for name, size in sizes.items():
        _whole(f"{section}.{name}", size, 1, _LARGEST_SIZE, "a positive whole number")


def _whole(what: str, got: object, least: int, most: int, allowed: str = "a whole number") -> int:
    if type(got) is not int or not least <= got <= most:
        raise CheckpointError(
            f"config.json: {what} must be {allowed} in {least}..{most}, got {shown(got)}; "
            "correct it or download the file again"
        )
    return got


def _one_of(what: str, got: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(got, str) or got not in allowed:
        raise CheckpointError(
            f"config.json: {what} is {shown(got)}; supported: {', '.join(allowed)}; "
            "give a checkpoint of the LLaVA-1.5 family in Hugging Face's layout"
        )
    return got


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
        _positive(
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
class Rope:
    """Rotary position embedding: base frequency and how it is stretched."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        _one_of("text_config.rope_parameters.rope_type", self.kind, ("default", "linear", "llama3"))
        for name, value in (
            ("rope_theta", self.theta),
            ("factor", self.factor),
            ("low_freq_factor", self.low_freq_factor),
            ("high_freq_factor", self.high_freq_factor),
            ("original_max_position_embeddings", self.original_max_positions),
        ):
            number(f"config.json: text_config.rope_parameters.{name}", value, above=0)
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise CheckpointError(
                f"config.json: rope high_freq_factor={self.high_freq_factor} must exceed "
                f"low_freq_factor={self.low_freq_factor}"
            )

    @classmethod
    def from_text_config(cls, text: Mapping[str, Any]) -> Rope:
        """Reads both spellings: `rope_parameters`, and the older `rope_scaling` beside `rope_theta`.

        Where a file has both, `rope_scaling` counts, as in transformers.
        """
        given = text.get("rope_scaling") or text.get("rope_parameters") or {}
        what = "config.json: text_config.rope_parameters"
        if not isinstance(given, Mapping):
            raise CheckpointError(f"{what} must be an object, got {shown(given)}")
        nested = [key for key, value in given.items() if isinstance(value, Mapping)]
        if nested:
            raise CheckpointError(f"{what} is not understood: {shown(nested[0])} is an object; one rope for all layers")
        kind = _one_of(
            "text_config.rope_parameters.rope_type",
            given.get("rope_type", given.get("type", "default")),
            ("default", "linear", "llama3"),
        )
        needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(kind, ())
        missing = [key for key in needed if key not in given]
        if missing:
            raise CheckpointError(f"{what} of type {kind!r} lacks {missing[0]}; download the file again")
        if given.get("partial_rotary_factor", text.get("partial_rotary_factor", 1)) != 1:
            raise CheckpointError(f"{what}: partial_rotary_factor is not understood; allowed: 1")
        # The published model's length stands outside in some files, and is the model's own in those that leave it out.
        original = text.get("original_max_position_embeddings", given.get("original_max_position_embeddings"))
        if kind != "llama3" or original is None:
            original = text["max_position_embeddings"]
        stretch = {key: _rope_number(key, given[key]) for key in needed}
        return cls(
            theta=_rope_number("rope_theta", given.get("rope_theta", text.get("rope_theta", 10000.0))),
            kind=kind,
            original_max_positions=_whole("original_max_position_embeddings", original, 1, _LARGEST_SIZE),
            **stretch,
        )


def _rope_number(name: str, got: object) -> float:
    try:
        return number(f"config.json: text_config.rope_parameters.{name}", got, above=0)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (the rotary embedding is not understood)") from error


@dataclass(frozen=True)
class TextGeometry:
    """The LLaMA decoder: sizes in channels, heads and layers."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    max_positions: int
    norm_eps: float
    activation: str
    attention_bias: bool
    mlp_bias: bool
    rope: Rope

    def __post_init__(self) -> None:
        _positive(
            "text_config",
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.mlp,
            vocab_size=self.vocab,
            max_position_embeddings=self.max_positions,
        )
        if self.heads % self.kv_heads:
            raise CheckpointError(
                f"config.json: text_config.num_attention_heads={self.heads} is not a multiple of "
                f"num_key_value_heads={self.kv_heads}"
            )
        if self.hidden % self.heads:
            raise CheckpointError(
                f"config.json: text_config.hidden_size={self.hidden} is not a multiple of "
                f"num_attention_heads={self.heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"config.json: text_config.head_dim={self.head_dim} must be even for rotary embedding"
            )
        _one_of("text_config.hidden_act", self.activation, ("silu",))
        number("config.json: text_config.rms_norm_eps", self.norm_eps, above=0, below=1)


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
    def image_tokens(self) -> int:
        """Image tokens before pruning."""
        return self.vision.tokens

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LlavaGeometry:
        """The geometry a LLaVA config.json describes; CheckpointError when it is not one, or contradicts itself."""
        config = without_nulls(config)
        _refuse_other_layouts(config)
        _one_of("model_type", config.get("model_type"), ("llava",))
        # An empty section means the defaults of its class, an absent one the tower of the published LLaVA-1.5.
        defaults = _VISION_DEFAULTS if "vision_config" in config else _VISION_WHEN_ABSENT
        vision = {**defaults, **_section(config, "vision_config")}
        text = {**_TEXT_DEFAULTS, **_section(config, "text_config")}
        top = {**_LLAVA_DEFAULTS, **config}
        _one_of("vision_config.model_type", vision["model_type"], ("clip_vision_model",))
        _one_of("text_config.model_type", text["model_type"], ("llama",))
        _one_of("vision_feature_select_strategy", top["vision_feature_select_strategy"], ("default",))
        _positive("text_config", hidden_size=text["hidden_size"], num_attention_heads=text["num_attention_heads"])
        _positive("vision_config", num_hidden_layers=vision["num_hidden_layers"])
        feature_layer = top["vision_feature_layer"]
        if isinstance(feature_layer, list) and len(feature_layer) == 1:  # the same features, by transformers' rules
            feature_layer = feature_layer[0]
        if type(feature_layer) is not int:
            raise CheckpointError(
                f"config.json: vision_feature_layer={shown(feature_layer)}; one layer number is supported, "
                "as in LLaVA-1.5"
            )
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
                attention_bias=flag("config.json: text_config.attention_bias", text["attention_bias"]),
                mlp_bias=flag("config.json: text_config.mlp_bias", text["mlp_bias"]),
                rope=Rope.from_text_config(text),
            ),
            # Hugging Face counts hidden states from the embeddings, so index i is the output of the i-th layer.
            tower_layers=feature_layer if feature_layer >= 0 else vision["num_hidden_layers"] + 1 + feature_layer,
            projector_activation=top["projector_hidden_act"],
            projector_bias=flag("config.json: multimodal_projector_bias", top["multimodal_projector_bias"]),
            image_token_id=_whole(
                "image_token_index", top.get("image_token_id", top["image_token_index"]), 0, _LARGEST_ID
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

    def sizes(self) -> dict[str, object]:
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

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the whole model under its canonical name (see export.checkpoints)."""
        return dict(self._tensor_shapes())

    def optional_tensors(self) -> frozenset[str]:
        """Tensors that nothing we build reads: a checkpoint without them is complete."""
        unused = tuple(f"vision_tower.encoder.layers.{i}." for i in range(self.tower_layers, self.vision.layers))
        names = {name for name in self.tensor_shapes() if name.startswith((*unused, "vision_tower.post_layernorm."))}
        if self.tied_embeddings:
            names.add("lm_head.weight")
        return frozenset(names)

    def vision_parameter_count(self, cut: int) -> int:
        """Parameters the vision subgraph holds: tower, projector and the decoder layers below the cut."""
        wanted = [
            "vision_tower.embeddings.",
            "vision_tower.pre_layrnorm.",
            *(f"vision_tower.encoder.layers.{i}." for i in range(self.tower_layers)),
            "multi_modal_projector.",
        ]
        wanted += [f"language_model.layers.{i}." for i in range(cut)]
        return sum(math.prod(shape) for name, shape in self.tensor_shapes().items() if name.startswith(tuple(wanted)))

    def text_parameter_count(self) -> int:
        """Parameters of the language half: embedding, all decoder layers, output matrix."""
        return sum(
            math.prod(shape)
            for name, shape in self.tensor_shapes().items()
            if name.startswith(("language_model.", "lm_head."))
        )

    def _tensor_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        vision, text = self.vision, self.text
        width = vision.hidden
        patch = vision.patch_size
        yield "vision_tower.embeddings.class_embedding", (width,)
        yield "vision_tower.embeddings.patch_embedding.weight", (width, vision.channels, patch, patch)
        yield "vision_tower.embeddings.position_embedding.weight", (vision.tokens + 1, width)
        for norm in ("pre_layrnorm", "post_layernorm"):  # the first spelling is the published one
            yield f"vision_tower.{norm}.weight", (width,)
            yield f"vision_tower.{norm}.bias", (width,)
        for i in range(vision.layers):
            base = f"vision_tower.encoder.layers.{i}"
            for norm in ("layer_norm1", "layer_norm2"):
                yield f"{base}.{norm}.weight", (width,)
                yield f"{base}.{norm}.bias", (width,)
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield from _linear(f"{base}.self_attn.{name}", width, width, bias=True)
            yield from _linear(f"{base}.mlp.fc1", width, vision.mlp, bias=True)
            yield from _linear(f"{base}.mlp.fc2", vision.mlp, width, bias=True)
        yield from _linear("multi_modal_projector.linear_1", width, text.hidden, bias=self.projector_bias)
        yield from _linear("multi_modal_projector.linear_2", text.hidden, text.hidden, bias=self.projector_bias)
        yield "language_model.embed_tokens.weight", (text.vocab, text.hidden)
        queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
        for i in range(text.layers):
            base = f"language_model.layers.{i}"
            yield f"{base}.input_layernorm.weight", (text.hidden,)
            yield from _linear(f"{base}.self_attn.q_proj", text.hidden, queries, bias=text.attention_bias)
            yield from _linear(f"{base}.self_attn.k_proj", text.hidden, keys, bias=text.attention_bias)
            yield from _linear(f"{base}.self_attn.v_proj", text.hidden, keys, bias=text.attention_bias)
            yield from _linear(f"{base}.self_attn.o_proj", queries, text.hidden, bias=text.attention_bias)
            yield f"{base}.post_attention_layernorm.weight", (text.hidden,)
            yield from _linear(f"{base}.mlp.gate_proj", text.hidden, text.mlp, bias=text.mlp_bias)
            yield from _linear(f"{base}.mlp.up_proj", text.hidden, text.mlp, bias=text.mlp_bias)
            yield from _linear(f"{base}.mlp.down_proj", text.mlp, text.hidden, bias=text.mlp_bias)
        yield "language_model.norm.weight", (text.hidden,)
        yield "lm_head.weight", (text.vocab, text.hidden)


def decisive_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copies from a config.json what decides about the model's arithmetic, and none of what else such files hold."""
    config = without_nulls(config)
    part = {key: config[key] for key in (*_LLAVA_DEFAULTS, "image_token_id", "image_seq_length") if key in config}
    for name, keys in (("vision_config", _VISION_DEFAULTS), ("text_config", (*_TEXT_DEFAULTS, *_ROPE_KEYS))):
        if name in config:
            part[name] = {key: value for key, value in _section(config, name).items() if key in keys}
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
    for name in ("", "vision_config", "text_config"):
        section = _section(config, name) if name else config
        for key in _QUANTISED_KEYS:
            if section.get(key):
                settings = section[key] if isinstance(section[key], Mapping) else {}
                raise CheckpointError(
                    f"config.json: the checkpoint is already quantised ({key}, {shown(settings.get('quant_method'))}); "
                    "pruneport quantises by itself, give it the float16, bfloat16 or float32 weights"
                )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, Mapping):
        raise CheckpointError(
            f"config.json: {name} must be an object, got {shown(section)}; correct it or download the file again"
        )
    return section


def _or(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _linear(name: str, width_in: int, width_out: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width_out, width_in)
    if bias:
        yield f"{name}.bias", (width_out,)


@dataclass(frozen=True)
class ModelEntry:
    """One model that `--model` can name: where its weights come from and what its prompt starts with."""

    name: str
    summary: str
    hub_id: str | None
    config: Mapping[str, Any]
    # Length of the stand-in prefix where no tokenizer is at hand: that of the real template with its system prompt.
    prefix_tokens: int = 35
    system_prompt: str | None = None
    # Taken instead of a backend's defaults where those would say more about the weights than about the export.
    precision: Literal["fp32", "fp16"] | None = None
    quant_text: str | None = None

    def __post_init__(self) -> None:
        if not self.name or self.prefix_tokens < 1:
            raise ValueError(f"a model needs a name and a prefix of at least one token, got {self.name!r}")

    @property
    def family(self) -> str:
        """The architecture that builds this model's graphs."""
        return "llava"

    @cached_property
    def geometry(self) -> LlavaGeometry:
        """The sizes this model must have, known without any weights."""
        return LlavaGeometry.from_config(self.config)


def check_same_model(entry: ModelEntry, geometry: LlavaGeometry, others: Mapping[str, ModelEntry], where: str) -> None:
    """Raises CheckpointError when `geometry`, read from `where`, is not the geometry of `entry`."""
    expected, got = entry.geometry.sizes(), geometry.sizes()
    if expected == got:
        return
    differing = [f"{name} {got[name]} instead of {expected[name]}" for name in expected if expected[name] != got[name]]
    match = [name for name, other in others.items() if other.geometry.sizes() == got]
    hint = f"these are the weights of {match[0]}: say --model {match[0]}" if match else f"give weights of {entry.name}"
    raise CheckpointError(f"{where} is not {entry.name}: {', '.join(differing)}; {hint}")


def image_info(checkpoint: Checkpoint, entry: ModelEntry) -> ImageInfo:
    """How a photo becomes pixel_values: from preprocessor_config.json, or CLIP's own settings without a folder."""
    from export.models.preprocessor import read_preprocessor
    from runtime.bundle import ImageInfo

    settings = read_preprocessor(checkpoint.folder, checkpoint.geometry.vision.image_size)
    try:
        info = ImageInfo.from_preprocessor(settings)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.folder}: {error}") from error
    side = checkpoint.geometry.vision.image_size
    if tuple(info.size) != (side, side):
        raise CheckpointError(
            f"{checkpoint.folder}: preprocessor_config.json crops to {info.size[0]} x {info.size[1]} pixels, "
            f"but the tower of {entry.name} takes {side} x {side}"
        )
    return info


def prompt_info(checkpoint: Checkpoint, entry: ModelEntry) -> PromptInfo:
    """The ids in front of the image and the text behind it (see export.models.prompt)."""
    from export.models.prompt import read_prompt

    return read_prompt(checkpoint.folder, checkpoint.geometry, entry)


# The system prompt LLaVA-1.5 was trained with (Vicuna's); with it the prefix has the 35 tokens of the paper's costs.
_VICUNA_SYSTEM = (
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
        "vision_config": dict(_VISION_WHEN_ABSENT),
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


LLAVA_7B = ModelEntry(
    name="llava-1.5-7b",
    summary="LLaVA-1.5 with Vicuna 7B: 576 image tokens, 32 layers of width 4096",
    hub_id="llava-hf/llava-1.5-7b-hf",
    config=_llava_config(hidden=4096, mlp=11008, layers=32, heads=32),
    system_prompt=_VICUNA_SYSTEM,
)
LLAVA_13B = ModelEntry(
    name="llava-1.5-13b",
    summary="LLaVA-1.5 with Vicuna 13B: 576 image tokens, 40 layers of width 5120",
    hub_id="llava-hf/llava-1.5-13b-hf",
    config=_llava_config(hidden=5120, mlp=13824, layers=40, heads=40),
    system_prompt=_VICUNA_SYSTEM,
)
