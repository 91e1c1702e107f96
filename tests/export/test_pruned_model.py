"""Pruning inside transformers' own generate(), against the evaluation's packed walk and against masks."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from export.checkpoints import open_checkpoint
from export.evaluation import run
from export.evaluation.eager import EagerModel
from export.evaluation.pruned_model import PrunedModel
from export.evaluation.questions import Line
from export.evaluation.views import View, image_views, shares
from export.models.pocket import POCKET
from export.share import Share
from runtime.errors import RequestError
from tests.talkative import talkative

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT: dict[str, Any] = {
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
TOWER: dict[str, Any] = {
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
    # 65 x 100 pixels go into 112 x 112: four tiles, of whose 8 rows 6 are no padding; and the whole in 4 x 4.
    ids = [1, 7, 8, *[IMAGE] * (16 + 6 * (8 + 1)), 9, 10, 11]
    return seeded(LlavaNextForConditionalGeneration, config), {
        "input_ids": torch.tensor([ids]),
        "pixel_values": torch.randn(1, 5, 3, 56, 56, generator=torch.Generator().manual_seed(1)),
        "image_sizes": torch.tensor([[65, 100]]),
    }


def qwen_vl(model: Any, config: Any, vision: dict[str, Any], *, patch: int = 14, **text: Any) -> tuple[Any, Inputs]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = config(
        vision_config={"hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, **vision},
        text_config={**TEXT, "rope_parameters": rope, **text},
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    ids = torch.tensor([[1, 7, 62, *[IMAGE] * 24, 63, 9, 62, *[IMAGE] * 6, 63, 10, 11]])
    patches = torch.randn(8 * 12 + 4 * 6, 3 * 2 * patch * patch, generator=torch.Generator().manual_seed(1))
    return seeded(model, config), {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 8, 12], [1, 4, 6]]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def qwen2_vl() -> tuple[Any, Inputs]:
    return qwen_vl(Qwen2VLForConditionalGeneration, Qwen2VLConfig, {"depth": 2, "embed_dim": 32, "mlp_ratio": 2})


def qwen2_5_vl() -> tuple[Any, Inputs]:
    vision = {"depth": 2, "intermediate_size": 40, "window_size": 56, "fullatt_block_indexes": [1]}
    return qwen_vl(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, vision)


def qwen3_vl() -> tuple[Any, Inputs]:
    vision = {"depth": 2, "intermediate_size": 40, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
    return qwen_vl(Qwen3VLForConditionalGeneration, Qwen3VLConfig, vision, patch=16, head_dim=8)


FAMILIES: dict[str, Callable[[], tuple[Any, Inputs]]] = {
    make.__name__: make for make in (llava, llava_next, qwen2_vl, qwen2_5_vl, qwen3_vl)
}


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
            if index < len(planes := seen.get("deepstack_visual_embeds") or ()):
                hidden[:, : inputs["input_ids"].shape[1]][:, inputs["input_ids"][0] == IMAGE] += planes[index]
        logits = model.lm_head(decoder.norm(hidden[0, -1]))
        logits[TEXT["eos_token_id"]] = -torch.inf  # as min_new_tokens has it
        said.append(int(logits.argmax()))
        embedded = torch.cat([embedded, decoder.embed_tokens(torch.tensor([said[-1:]]))], 1)
        positions = torch.cat([positions, positions.amax() + torch.ones_like(positions[..., :1])], -1)
    return said


@pytest.mark.parametrize(
    ("family", "cut", "attention"),
    [
        (family, cut, how)
        for family in FAMILIES
        for cut, how in ((0, "eager"), (2, "sdpa"))
        if cut or family != "qwen3_vl"
    ],
)
def test_dropped_tokens_are_as_if_masked(family: str, cut: int, attention: str) -> None:
    model, inputs = FAMILIES[family]()
    model.set_attn_implementation(attention)
    views = image_views(model.config, inputs)
    pruned = PrunedModel(model, method="divprune", keep=0.3 if cut else "30%", cut=cut)
    said = pruned.generate(inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0].tolist()
    dropped = []
    for image, kept in zip(views, pruned.kept, strict=True):
        assert sum(map(len, kept)) == math.floor(0.3 * sum(len(view.slots) for view in image) + 0.5)
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


def test_answers_are_those_of_the_evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is generated is what `pruneport eval` takes for right, from the same kept tokens, method by method."""
    checkpoint = open_checkpoint(POCKET, weights=str(talkative(tmp_path / "model")))
    model = EagerModel(checkpoint, POCKET)
    photo = np.random.default_rng(0).integers(0, 255, (340, 360, 3), dtype=np.uint8)
    question = model._tokenizer.question_ids("How many are there?")
    whole = LlavaForConditionalGeneration.from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    inputs = {
        "input_ids": torch.tensor([[*model._frame.ids, *question]]),
        "pixel_values": torch.from_numpy(np.array(model._desktop.pixels(photo))),
    }
    cells = [
        run.Wanted("vlm-pruner", 64, 2),
        run.Wanted("vlm-pruner", 16, 0),
        run.Wanted("visionzip", 16, 0),
        run.Wanted("fastv", 16, 2),
    ]
    answers, kept = [], []
    for cell in cells:
        pruned = PrunedModel(whole, method=cell.method, keep=cell.keep, cut=cell.cut)
        ids = pruned.generate(inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        answers.append(ids[0].tolist())
        kept.append(pruned.kept)
    assert len({tuple(answer) for answer in answers}) > 1
    said = {str(number): answer[:-1] for number, answer in enumerate(answers)}
    monkeypatch.setattr(model._tokenizer, "answer_ids", lambda answer: said[answer])
    reading = model.read(photo, [Line("x", "How many are there?", number) for number in said], [0, 2])
    ends = (reading.block.diff(append=torch.tensor([-1])) != 0).nonzero()[:, 0]
    for number, cell in enumerate(cells):
        chosen = run._Chooser(model, cell).choose(reading.features[cell.cut])
        assert chosen is not None
        assert kept[number] == [[chosen[1][0].tolist()]]
        for last, right in ((answers[number][-1], True), ((answers[number][-1] + 1) % 300, False)):
            reading.goals[ends] = last
            assert model.right(reading, cell.cut, chosen)[number] is right, cell


def test_views_are_laid_out_family_by_family() -> None:
    model, inputs = llava_next()
    ((whole, tiles),) = image_views(model.config, inputs)
    assert whole == View(slots=tuple(range(3, 19)), grid=(4, 4))
    assert tiles.grid == (6, 8)
    assert tiles.line_ends == tuple(range(27, 27 + 6 * 9, 9))
    assert tiles.slots == tuple(place for place in range(19, 19 + 6 * 9) if place not in tiles.line_ends)
    model, inputs = qwen2_vl()
    views = image_views(model.config, inputs)
    assert [[(view.grid, view.slots[0], view.slots[-1]) for view in image] for image in views] == [
        [((4, 6), 3, 26)],
        [((2, 3), 30, 35)],
    ]
    with pytest.raises(RequestError, match="30 image tokens where qwen2_vl with these pictures should have 24"):
        image_views(model.config, {**inputs, "image_grid_thw": inputs["image_grid_thw"][:1]})
    with pytest.raises(RequestError, match="2 prompts at once"):
        image_views(model.config, {**inputs, "input_ids": inputs["input_ids"].expand(2, -1)})
    with pytest.raises(RequestError, match="video"):
        image_views(model.config, {**inputs, "pixel_values_videos": inputs["pixel_values"]})
    assert image_views(model.config, {"input_ids": torch.tensor([[1, 2]])}) == []


@pytest.mark.parametrize(
    ("keep", "sizes", "expected"),
    [
        (64, [576], [64]),
        (900, [576], [576]),
        (Share(Fraction("0.11")), [576], [63]),
        (Share(Fraction("0.111")), [576], [64]),
        (Share(Fraction("0.0001")), [576], [1]),
        (Share(Fraction(1)), [16, 48], [16, 48]),
        (Share(Fraction("0.011")), [16, 2484], [0, 28]),  # 27.5: the larger of two that are as near
        (160, [576, 2304], [32, 128]),
        (10, [16, 48], [3, 7]),  # 2.5 and 7.5: the first of two equal remainders
        (1, [16, 48], [0, 1]),
        (Share(Fraction(1, 2)), [3, 3], [2, 1]),
    ],
)
def test_views_share_what_is_kept(keep: int | Share, sizes: list[int], expected: list[int]) -> None:
    assert shares(keep, sizes) == expected


@pytest.mark.parametrize(
    ("family", "arguments", "words"),
    [
        ("llava", {"method": "best", "keep": 4}, "method=best is not known; allowed: vlm-pruner"),
        ("llava", {"method": "uniform", "keep": 0}, "keep=0 must be"),
        ("llava", {"method": "uniform", "keep": 1.5}, r"keep=1\.5 must be"),
        ("llava", {"method": "uniform", "keep": float("nan")}, "keep=nan must be"),
        ("llava", {"method": "uniform", "keep": True}, "keep=True must be"),
        ("llava", {"method": "uniform", "keep": "4"}, "keep='4' must be"),
        ("llava", {"method": "uniform", "keep": "101%"}, "keep=101% is not a share that can be kept"),
        ("llava", {"method": "uniform", "keep": 17}, "keep=17: an image has 16 tokens"),
        ("llava", {"method": "uniform", "keep": 4, "cut": 4}, r"cut=4: uniform may prune at .* the model at 0\.\.3"),
        ("llava", {"method": "visionzip", "keep": 4, "cut": 1}, "cut=1: visionzip may prune at 0"),
        ("qwen2_vl", {"method": "visionzip", "keep": 4}, "looks at attention and keys of the tower's last layer"),
        ("qwen3_vl", {"method": "uniform", "keep": 4, "cut": 1}, r"the model at 2\.\.3"),
        ("qwen3_vl", {"method": "holov", "keep": 4}, r"holov may prune at 0\.\.0, and the model at 2\.\.3"),
        ("llava_next", {"method": "vlm-pruner", "keep": 4, "cut": 0}, "and this is llava_next; prune at 1 or later"),
    ],
)
def test_what_cannot_be_pruned_is_refused(family: str, arguments: dict[str, Any], words: str) -> None:
    model, _ = FAMILIES[family]()
    with pytest.raises(RequestError, match=words):
        PrunedModel(model, **arguments)


def test_a_model_that_cannot_be_pruned_is_refused() -> None:
    model, inputs = llava()
    model.set_attn_implementation("sdpa")
    with pytest.raises(RequestError, match="load the model with attn_implementation=eager"):
        PrunedModel(model, method="fastv", keep=4)
    whole = model.generate(**inputs, max_new_tokens=4).tolist()
    pruned = PrunedModel(model, method="uniform", keep=4)
    with pytest.raises(RequestError, match="padded"):
        pruned.generate({**inputs, "attention_mask": (inputs["input_ids"] != 1).long()})
    with pytest.raises(RequestError, match="num_beams=1"):
        pruned.generate(inputs, num_beams=2, max_new_tokens=2)
    assert model.generate(**inputs, max_new_tokens=4).tolist() == whole, "something still hangs in the model"
    for name, value in (("sliding_window", 8), ("layer_types", ["full_attention", "sliding_attention"])):
        setattr(model.config.get_text_config(), name, value)
        with pytest.raises(RequestError, match="sliding window"):
            PrunedModel(model, method="uniform", keep=4)
    model.config.model_type = "paligemma"
    with pytest.raises(RequestError, match="'paligemma' cannot be pruned here; allowed: llava, llava_next, qwen2_vl"):
        PrunedModel(model, method="uniform", keep=4)
