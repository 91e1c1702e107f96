"""The tensors of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL: what the graphs call them, and how files spell their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from export.families.family import TensorEntry, decoder_tensors, linear
from export.families.qwen_vl.config import QwenGeometry, Version

# Beginnings of the graphs' names, by those in files as they are published; transformers' modules have another front.
_PUBLISHED: Mapping[str, str] = {
    "tower.patch_embedding.": "visual.patch_embed.proj.",
    "tower.position_embedding.": "visual.pos_embed.",
    "tower.norm.": "visual.merger.ln_q.",
    "tower.projector.linear_1.": "visual.merger.mlp.0.",
    "tower.projector.linear_2.": "visual.merger.mlp.2.",
    "tower.planes.": "visual.deepstack_merger_list.",
    "tower.layers.": "visual.blocks.",
    "lm_head.": "lm_head.",
    "": "model.",
}
# Where Qwen3-VL has other names than its predecessors.
_PUBLISHED_3: Mapping[str, str] = {
    **_PUBLISHED,
    "tower.norm.": "visual.merger.norm.",
    "tower.projector.linear_1.": "visual.merger.linear_fc1.",
    "tower.projector.linear_2.": "visual.merger.linear_fc2.",
}
# Inside the tower's layers, and its mergers for decoder layers.
_IN_LAYERS: Mapping[str, str] = {
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.qkv_proj.": ".attn.qkv.",
    ".self_attn.out_proj.": ".attn.proj.",
    ".projector.linear_1.": ".linear_fc1.",
    ".projector.linear_2.": ".linear_fc2.",
}
_IN_LAYERS_3: Mapping[str, str] = {**_IN_LAYERS, ".mlp.fc1.": ".mlp.linear_fc1.", ".mlp.fc2.": ".mlp.linear_fc2."}


def tensors(geometry: QwenGeometry) -> dict[str, TensorEntry]:
    """Lists every tensor of the whole model by its canonical name."""
    tied = {"lm_head.weight": "embed_tokens.weight"} if geometry.tied_embeddings else {}
    return {
        name: TensorEntry(shape, spellings(name, geometry.version), instead=tied.get(name))
        for name, shape in (*_tower_tensors(geometry), *decoder_tensors(geometry.text))
    }


def spellings(name: str, version: Version) -> tuple[str, ...]:
    """Spells a canonical name as published files do, and as transformers' modules are built, where that differs."""
    third = version == "qwen3_vl"
    starts, in_layers = (_PUBLISHED_3, _IN_LAYERS_3) if third else (_PUBLISHED, _IN_LAYERS)
    start = next(start for start in starts if name.startswith(start))
    published = starts[start] + name.removeprefix(start)
    if start in ("tower.layers.", "tower.planes."):
        for ours, theirs in in_layers.items():
            published = published.replace(ours, theirs)
    if start == "lm_head.":
        return (published,)
    front = "model.language_model." if start == "" else "model."
    built = front + (published.removeprefix("model.") if start == "" else published)
    return (built,) if third else (published, built)


def _tower_tensors(geometry: QwenGeometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    tower, width = geometry.tower, geometry.tower.hidden
    patch, merged = tower.patch_size, tower.hidden * tower.merge**2
    yield "tower.patch_embedding.weight", (width, tower.channels, tower.frames, patch, patch)
    if tower.patch_bias:
        yield "tower.patch_embedding.bias", (width,)
    if tower.table is not None:
        yield "tower.position_embedding.weight", (tower.table**2, width)
    for index in range(tower.layers):
        base = f"tower.layers.{index}"
        yield from _norm(f"{base}.layer_norm1", width, gated=tower.gated)
        yield from linear(f"{base}.self_attn.qkv_proj", width, 3 * width, bias=True)
        yield from linear(f"{base}.self_attn.out_proj", width, width, bias=True)
        yield from _norm(f"{base}.layer_norm2", width, gated=tower.gated)
        if tower.gated:
            yield from linear(f"{base}.mlp.gate_proj", width, tower.mlp, bias=True)
            yield from linear(f"{base}.mlp.up_proj", width, tower.mlp, bias=True)
            yield from linear(f"{base}.mlp.down_proj", tower.mlp, width, bias=True)
        else:
            yield from linear(f"{base}.mlp.fc1", width, tower.mlp, bias=True)
            yield from linear(f"{base}.mlp.fc2", tower.mlp, width, bias=True)
    yield from _norm("tower.norm", width, gated=tower.gated)
    yield from linear("tower.projector.linear_1", merged, merged, bias=True)
    yield from linear("tower.projector.linear_2", merged, geometry.text.hidden, bias=True)
    for index in range(len(tower.planes)):
        base = f"tower.planes.{index}"
        yield from _norm(f"{base}.norm", merged, gated=tower.gated)
        yield from linear(f"{base}.projector.linear_1", merged, merged, bias=True)
        yield from linear(f"{base}.projector.linear_2", merged, geometry.text.hidden, bias=True)


def _norm(name: str, width: int, *, gated: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    if not gated:
        yield f"{name}.bias", (width,)
