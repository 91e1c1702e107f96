"""A question becomes the ids that transformers makes of the whole conversation, and ids become text as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.checkpoints import FolderCheckpoint
from export.models.llava import prompt_info
from export.models.pocket import POCKET, pocket_folder
from runtime.bundle import PromptInfo
from runtime.errors import BundleError, RequestError
from runtime.prompt import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pocket_folder(tmp_path_factory.mktemp("pocket"))


@pytest.fixture(scope="module")
def prompt(folder: Path) -> PromptInfo:
    return prompt_info(FolderCheckpoint(folder, POCKET), POCKET)


@pytest.fixture(scope="module")
def tokenizer(folder: Path, prompt: PromptInfo) -> Tokenizer:
    return Tokenizer(folder / "tokenizer.json", prompt)


@pytest.mark.parametrize(
    "question",
    ["What is this?", " two  spaces ", "line\nbreak", "naïve café 漢字 🙂", "{question}", "a" * 500, "ASSISTANT:"],
    ids=lambda text: text[:12],
)
def test_ids_are_those_of_transformers(folder: Path, prompt: PromptInfo, tokenizer: Tokenizer, question: str) -> None:
    from transformers import AutoTokenizer

    theirs: Any = AutoTokenizer.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = theirs.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    expected = theirs(text)["input_ids"]
    image = POCKET.geometry.image_token_id
    assert [*prompt.prefix_ids, image, *tokenizer.question_ids(question)] == expected


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "the question is empty"),
        (" \n", "the question is empty"),
        ("caf\udce9", "not valid text"),
        ("and <image> too?", "a second image"),
        ("stop</s>", "special token '</s>'"),
    ],
)
def test_question_that_cannot_be_asked(tokenizer: Tokenizer, question: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        tokenizer.question_ids(question)


def test_text_streams_whole_characters(folder: Path, tokenizer: Tokenizer) -> None:
    import tokenizers

    said = "a naïve 漢字 🙂, is it?"
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(said, add_special_tokens=False).ids
    pieces = list(tokenizer.text(ids))
    assert "".join(pieces) == said
    assert len(pieces) > 5
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert list(tokenizer.text([2, *ids, 2])) == pieces


def test_text_cut_inside_a_character_is_what_decoding_it_whole_gives(folder: Path, tokenizer: Tokenizer) -> None:
    import tokenizers

    whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = whole.encode("漢字 naïve 🙂", add_special_tokens=False).ids
    for end in range(len(ids) + 1):
        assert "".join(tokenizer.text(ids[:end])) == whole.decode(ids[:end])
    assert "".join(tokenizer.text(ids[:-1])).endswith("\N{REPLACEMENT CHARACTER}")
    # A byte that no character continues holds back nothing behind it.
    assert next(tokenizer.text([ids[1], *ids])).startswith("\N{REPLACEMENT CHARACTER}")


def test_bundle_without_a_template_cannot_be_asked(folder: Path, tmp_path: Path, prompt: PromptInfo) -> None:
    with pytest.raises(BundleError, match="no chat template"):
        Tokenizer(folder / "tokenizer.json", PromptInfo(prefix_ids=(1, 2), special_ids=prompt.special_ids))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", prompt)
