"""A checkpoint with its processor and chat template, asked as lmms-eval asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.checkpoints import open_checkpoint
from export.evaluation.chat_model import ChatModel, interleaved, known_system_prompt, until
from export.evaluation.eager import EagerModel
from export.families import MODELS
from export.models.pocket import POCKET, pocket_folder
from runtime.errors import CheckpointError, RequestError

pytestmark = pytest.mark.usefixtures("one_thread")

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 360, 3), dtype=np.uint8))


def test_the_unpruned_answer_is_that_of_transformers() -> None:
    chat = ChatModel(str(pocket_folder()), dtype="fp32")
    assert chat.pruned is None
    assert chat.model.dtype == torch.float32
    inputs = chat.inputs("How many are there?", [PHOTO])
    # The prompt, and the photo as it is prepared, are those of `pruneport eval`.
    eager = EagerModel(open_checkpoint("pocket"), POCKET)
    assert inputs["input_ids"][0].tolist() == [
        *eager._frame.ids,
        *eager._tokenizer.question_ids("How many are there?"),
    ]
    pixels = eager._desktop.pixels(np.asarray(PHOTO))
    assert np.array_equal(inputs["pixel_values"].numpy(), pixels)
    own = chat.model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = chat.processor.batch_decode(own, skip_special_tokens=True)[0].strip()
    asked = {"max_new_tokens": 8, "temperature": 0}
    assert chat.answer("How many are there?", [PHOTO], asked) == expected
    assert chat.answer("How many are there?", [PHOTO], {**asked, "until": [expected[4:]]}) == expected[:4].strip()
    assert chat.answer("Say something.", [], asked) != expected


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float16), ("bf16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_pruned_answer_in_other_dtypes(dtype: str, expected: torch.dtype) -> None:
    chat = ChatModel(str(pocket_folder()), keep=16, dtype=dtype)
    assert chat.pruned is not None
    assert chat.model.dtype == expected
    assert chat.answer("What is it?", [PHOTO], {"max_new_tokens": 3, "temperature": 0})
    ((kept,),) = chat.pruned.kept
    assert len(kept) == len(set(kept)) == 16
    assert chat.pruned.cut == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "none", "keep": 64}, "method=none prunes nothing, and keep=64 asks for it"),
        ({"method": "divprune"}, "method=divprune needs keep"),
        ({"method": "best", "keep": 64}, "method=best is not known; allowed: none, vlm-pruner"),
        ({"dtype": "int8"}, "dtype=int8 is not known; allowed: auto, float32"),
        ({"max_pixels": 5}, "max_pixels: only qwen2_vl, qwen2_5_vl, qwen3_vl take it, and this is llava"),
    ],
)
def test_arguments_that_mean_nothing(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        ChatModel(str(pocket_folder()), **arguments)


def test_what_is_no_checkpoint(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "paligemma"}')
    with pytest.raises(RequestError, match="'paligemma'; allowed: llava, llava_next, qwen2_vl"):
        ChatModel(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded by transformers"):
        ChatModel(str(tmp_path))


def test_a_known_model_has_its_own_system_prompt() -> None:
    from transformers import LlavaConfig

    entry = MODELS["llava-1.5-7b"]
    config: Any = LlavaConfig.from_dict(dict(entry.config))
    assert entry.system_prompt
    assert known_system_prompt(config) == entry.system_prompt
    config.text_config.num_hidden_layers = 31
    assert known_system_prompt(config) is None
    config.vision_config.num_channels = 4  # nothing that is exported
    assert known_system_prompt(config) is None
    config.model_type = "qwen2_vl"
    assert known_system_prompt(config) is None


def test_images_stand_where_they_are_marked() -> None:
    def kinds(text: str, images: int) -> list[str]:
        return [part.get("text", "image") for part in interleaved(text, [PHOTO] * images)]

    assert kinds("what?", 0) == ["what?"]
    assert kinds("what?", 2) == ["image", "image", "what?"]
    assert kinds("this <image> and <image>?", 2) == ["this ", "image", " and ", "image", "?"]
    with pytest.raises(RequestError, match="1 marks <image> for 2 images"):
        kinds("this <image>", 2)


@pytest.mark.parametrize(
    ("stops", "expected"),
    [(None, "a b\n\nc"), ("\n\n", "a b"), (["c", " b"], "a"), (["", "z"], "a b\n\nc"), ([], "a b\n\nc")],
)
def test_an_answer_ends_at_the_first_stop(stops: str | list[str] | None, expected: str) -> None:
    assert until(" a b\n\nc ", stops) == expected
