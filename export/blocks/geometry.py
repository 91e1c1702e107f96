"""The numbers that the decoder's blocks are built from, free of torch; errors spell them as config.json does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.settings import LARGEST_SIZE, number, one_of, positive, shown, whole
from runtime.errors import CheckpointError

_REMEDY = "give a checkpoint whose decoder is built like that"


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and how it is stretched.

    Where a position has several axes, `sections` are so many frequencies each, the first turned by the first axis, the
    next by the next; together they are all frequencies of a head. With `interleaved` the axes take turns instead: of
    three frequencies one each, until an axis behind the first has its number, whose turns are the first axis's then.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        one_of(
            "config.json: text_config.rope_parameters.rope_type", self.kind, ("default", "linear", "llama3"), _REMEDY
        )
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
        kind = one_of(
            "config.json: text_config.rope_parameters.rope_type",
            given.get("rope_type", given.get("type", "default")),
            ("default", "linear", "llama3"),
            _REMEDY,
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
        stretch: dict[str, Any] = {key: _rope_number(key, given[key]) for key in needed}
        return cls(
            theta=_rope_number("rope_theta", given.get("rope_theta", text.get("rope_theta", 10000.0))),
            kind=kind,
            original_max_positions=whole("config.json: original_max_position_embeddings", original, 1, LARGEST_SIZE),
            **stretch,
        )


def _rope_number(name: str, got: object) -> float:
    try:
        return number(f"config.json: text_config.rope_parameters.{name}", got, above=0)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (the rotary embedding is not understood)") from error


@dataclass(frozen=True)
class TextGeometry:
    """A decoder of LLaMA's kind: sizes in channels, heads and layers, and where its linear layers have a bias.

    With `qk_norm` each head of queries and keys is normed in front of the rotary embedding (arXiv 2505.09388).
    """

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
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rope: Rope
    qk_norm: bool = False

    def __post_init__(self) -> None:
        positive(
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
        if self.rope.sections and sum(self.rope.sections) != self.head_dim // 2:
            raise CheckpointError(
                f"config.json: text_config.rope_parameters.mrope_section={list(self.rope.sections)} must add up to "
                f"half of head_dim={self.head_dim}; download the file again"
            )
        if self.rope.interleaved and any(
            axis + len(self.rope.sections) * (size - 1) >= self.head_dim // 2
            for axis, size in enumerate(self.rope.sections)
            if axis
        ):
            raise CheckpointError(
                f"config.json: text_config.rope_parameters.mrope_section={list(self.rope.sections)} names more than "
                f"every third of the {self.head_dim // 2} frequencies for one axis behind the first, and the axes take "
                "turns; download the file again"
            )
        one_of("config.json: text_config.hidden_act", self.activation, ("silu",), _REMEDY)
        number("config.json: text_config.rms_norm_eps", self.norm_eps, above=0, below=1)
