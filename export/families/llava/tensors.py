"""The tensors of a LLaVA model: what the graphs call them, and how files of either published layout spell them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from export.families.family import TensorEntry, decoder_tensors, linear, renamed
from export.families.llava.config import LlavaGeometry, VisionGeometry

# What stands in front of the graphs' names in the modules of transformers.
_PUBLISHED: Mapping[str, str] = {
    "tower.layers.": "vision_tower.encoder.layers.",
    "tower.projector.": "multi_modal_projector.",
    "tower.image_newline": "image_newline",
    "tower.": "vision_tower.",
    "lm_head.": "lm_head.",
    "": "language_model.",
}
# What the older layout writes instead; either layout may have `vision_model.` in it, and `model.` in front of all.
_OLDER: Mapping[str, str] = {
    "language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "vision_tower.": "vision_tower.vision_model.",
}
# Beginnings of the names of all parts that graphs are built from, and of what other layouts call them.
_BUILT_PARTS = (
    "vision_tower.",
    "multi_modal_projector.",
    "language_model.",
    "lm_head.",
    "layers.",
    "embed_tokens.",
    "mm_projector.",
    "vision_model.",
    "image_newline",
)
# The keys of config.json that announce biases, by the published names of these.
_BIAS_KEYS: Mapping[str, str] = {
    r"language_model\.layers\.\d+\.self_attn\.[qkvo]_proj\.bias": "text_config.attention_bias",
    r"language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.bias": "text_config.mlp_bias",
    r"multi_modal_projector\.linear_[12]\.bias": "multimodal_projector_bias",
}


def tensors(geometry: LlavaGeometry) -> dict[str, TensorEntry]:
    """Lists every tensor of the whole model by its canonical name."""
    unread = (
        "tower.post_layernorm.",
        *(f"tower.layers.{index}." for index in range(geometry.tower_layers, geometry.vision.layers)),
    )
    tied = {"lm_head.weight": "embed_tokens.weight"} if geometry.tied_embeddings else {}
    return {
        name: TensorEntry(shape, spellings(name), needed=not name.startswith(unread), instead=tied.get(name))
        for name, shape in (*_tower_tensors(geometry), *decoder_tensors(geometry.text))
    }


def spellings(name: str) -> tuple[str, ...]:
    """Spells a canonical name as files do; the first is that of the newer layout without `model.` in front."""
    published = renamed(name, _PUBLISHED)
    older = [old + published.removeprefix(new) for new, old in _OLDER.items() if published.startswith(new)]
    return tuple(f"{front}{spelling}" for spelling in (published, *older) for front in ("", "model."))


def stray(stored: str) -> str | None:
    """Says what to do about a tensor that no model of the family has; None for one that is no part of a model."""
    name = stored.removeprefix("model.")
    for new, old in _OLDER.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if not name.startswith(_BUILT_PARTS):
        return None
    for pattern, key in _BIAS_KEYS.items():
        if re.fullmatch(pattern, name):
            return f"set {key} to true in config.json if the model was trained with it"
    return "the weights belong to another model, or config.json does"


def other_layout(stored: Sequence[str]) -> str | None:
    """Says what to do about the layout that LLaVA's authors publish; None if it is not that."""
    if any("mm_projector" in name for name in stored):
        return "this is the authors' own layout: give the converted one, as under llava-hf on the hub"
    return None


def _tower_tensors(geometry: LlavaGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, text = geometry.vision.hidden, geometry.text
    if geometry.newline:
        yield "tower.image_newline", (text.hidden,)
    yield from vision_tensors(geometry.vision)
    yield from linear("tower.projector.linear_1", width, text.hidden, bias=geometry.projector_bias)
    yield from linear("tower.projector.linear_2", text.hidden, text.hidden, bias=geometry.projector_bias)


def vision_tensors(vision: VisionGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Canonical names and shapes of a tower of CLIP's or SigLIP's kind, without its projector."""
    width, patch = vision.hidden, vision.patch_size
    if vision.class_token:
        yield "tower.embeddings.class_embedding", (width,)
    yield "tower.embeddings.patch_embedding.weight", (width, vision.channels, patch, patch)
    if not vision.class_token:
        yield "tower.embeddings.patch_embedding.bias", (width,)
    yield "tower.embeddings.position_embedding.weight", (vision.tokens + vision.class_token, width)
    # The first spelling is the published one.
    for norm in ("pre_layrnorm", "post_layernorm") if vision.class_token else ("post_layernorm",):
        yield f"tower.{norm}.weight", (width,)
        yield f"tower.{norm}.bias", (width,)
    for index in range(vision.layers):
        base = f"tower.layers.{index}"
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"{base}.{norm}.weight", (width,)
            yield f"{base}.{norm}.bias", (width,)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{base}.self_attn.{name}", width, width, bias=True)
        yield from linear(f"{base}.mlp.fc1", width, vision.mlp, bias=True)
        yield from linear(f"{base}.mlp.fc2", vision.mlp, width, bias=True)
