"""Pruning inside transformers' own generate(), against the evaluation's packed walk and against masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from export.checkpoints import open_checkpoint
from export.evaluation import run
from export.evaluation.eager import EagerModel
from export.evaluation.pruned_model import PrunedModel
from export.evaluation.questions import Line
from export.evaluation.views import View, image_views, shares
from export.models.pocket import POCKET, pocket_folder
from pruning import METHODS
from runtime.errors import RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TOWER: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
IMAGE = 60
Inputs = dict[str, Tensor]


def seeded(kind: type[Any], config: Any) -> Any:
    """A small model with weights that make every token count."""
    torch.manual_seed(5)
    config._attn_implementation = "eager"
    model = kind._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.normal_(0, 1.5 / weight.shape[-1] ** 0.5)
    return model


def llava() -> tuple[Any, Inputs]:
    config = LlavaConfig(vision_config=TOWER, text_config={"model_type": "llama", **TEXT}, image_token_index=IMAGE)
    ids = [1, 7, 8, *[IMAGE] * 16, 9, 10, *[IMAGE] * 16, 11, 12, 13]  # two images
    return seeded(LlavaForConditionalGeneration, config), {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1)),
    }


def llava_next() -> tuple[Any, Inputs]:
    config = LlavaNextConfig(
        vision_config=TOWER,
        text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
    # 60 x 100 pixels go into 112 x 112: 4 tiles, of which 6 of 8 rows are no padding; and the whole in 4 x 4.
    ids = [1, 7, 8, *[IMAGE] * (16 + 6 * (8 + 1)), 9, 10, 11]
    return seeded(LlavaNextForConditionalGeneration, config), {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(1, 5, 3, 56, 56, generator=torch.Generator().manual_seed(1)),
        "image_sizes": torch.tensor([[65, 100]]),
    }


def qwen2_vl() -> tuple[Any, Inputs]:
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    ids = torch.tensor([[1, 7, 62, *[IMAGE] * 24, 63, 9, 62, *[IMAGE] * 6, 63, 10, 11]])
    patches = torch.randn(8 * 12 + 4 * 6, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
    return seeded(Qwen2VLForConditionalGeneration, config), {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 8, 12], [1, 4, 6]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


FAMILIES = {"llava": llava, "llava_next": llava_next, "qwen2_vl": qwen2_vl}


@torch.no_grad()
def masked(model: Any, inputs: Inputs, dropped: list[int], cut: int, tokens: int) -> list[int]:
    """Greedy tokens of the whole model, where layers from `cut` on see every token but the dropped ones."""
    decoder, seen = model.model.language_model, {}
    watch = decoder.register_forward_pre_hook(lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**inputs)
    watch.remove()
    embedded, positions = seen["inputs_embeds"], seen["position_ids"]
    if positions is None:
        positions = torch.arange(embedded.shape[1])[None]
    said: list[int] = []
    for _ in range(tokens):
        at = torch.arange(embedded.shape[1])
        hidden, tables = embedded, decoder.rotary_emb(embedded, position_ids=positions)
        for index, layer in enumerate(decoder.layers):
            closed = at[:, None] < at
            if index >= cut:
                closed = closed | torch.isin(at, torch.tensor(dropped))[None]
            mask = torch.zeros(closed.shape).masked_fill(closed, torch.finfo(torch.float32).min)
            hidden = layer(hidden, attention_mask=mask[None, None], position_embeddings=tables)
        said.append(int(model.lm_head(decoder.norm(hidden[0, -1])).argmax()))
        embedded = torch.cat([embedded, decoder.embed_tokens(torch.tensor([said[-1:]]))], 1)
        positions = torch.cat([positions, positions.amax() + torch.ones_like(positions[..., :1])], -1)
    return said


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_tokens_are_as_if_masked(family: str, cut: int, attention: str) -> None:
    model, inputs = FAMILIES[family]()
    model.set_attn_implementation(attention)
    views = image_views(model.config, inputs)
    pruned = PrunedModel(model, method="divprune", keep=0.3, cut=cut)
    said = pruned.generate(inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0].tolist()
    dropped = []
    for image, kept in zip(views, pruned.kept, strict=True):
        assert sum(map(len, kept)) == int(0.3 * sum(len(view.slots) for view in image))
        for view, stayed in zip(image, kept, strict=True):
            dropped += [slot for token, slot in enumerate(view.slots) if token not in stayed]
            rows = {token // view.grid[1] for token in stayed}
            dropped += [slot for row, slot in enumerate(view.line_ends) if row not in rows]
    model.set_attn_implementation("eager")
    expected = masked(model, inputs, dropped, cut, 6)
    assert said == expected
    whole = masked(model, inputs, [], cut, 6)
    assert whole != expected, "the case cannot tell pruned from whole"
    assert model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, -6:].tolist() == whole
