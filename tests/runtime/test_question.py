"""A question becomes the ids that transformers makes of the whole conversation, and ids become text as they come."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.models.pocket import POCKET, pocket_folder
from export.models.prompt import read_prompt
from runtime.bundle import PromptInfo
from runtime.errors import BundleError, RequestError
from runtime.prompt import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pocket_folder()


@pytest.fixture(scope="module")
def prompt(folder: Path) -> PromptInfo:
    return read_prompt(folder, POCKET.geometry, POCKET)


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


TEXT = "messages[-1]['content'][1]['text']"
TEMPLATES = {
    "pasted": "{{ T }}",
    "trimmed": "{{ T | trim }}",
    "trimmed in Python": "{{ T.strip() }}",
    "other characters": "{{ T.strip('? ') }}",
    "one side": "{{ T.lstrip() }}",
    "upper case": "{{ T | upper }}",
    "words": "{{ T.split() | join(' ') }}",
    "cut": "{{ T[:9] }}",
    "twice": "{{ T }} {{ T }}",
    "escaped": "{{ T | e }}",
    "JSON": "{{ T | tojson }}{{ messages[-1] | tojson(indent=1) }}{{ '<é>' | tojson(ensure_ascii=True) }}",
    "its repr": "{{ [T] }}",
    "its length": "{{ T | length }} {{ T }}",
    "what it holds": "{% if 'cat' in T %}CAT {% endif %}{{ T }}",
    "where it is long": "{% if T | length > 200 %}LONG {% endif %}{{ T }}",
    "where it is not empty": "{% if T %}{{ T }}{% endif %}",
    "special tokens": "{{ T }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ image_token is defined }}",
    "nothing else": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ T }}{{ nobody_knows }}",
    "date": "{{ strftime_now('%d %b %Y') }} {{ T }}",
    "loop controls": "{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ T }}",
    "generation": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ T }}{{ a }}{% endgeneration %}{{ a }}",
    "namespace": "{% set n = namespace(self=1) %}{% for i in range(3) %}{% set n.self = n.self + i %}{% endfor %}"
    "{{ n.self }}{{ T }}",
    "dict": "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['b'], 2) | tojson }}{{ T }}",
    "macro": "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(T) }}",
    "kinds of content": "{% for m in messages %}{% if m.content is string %}S{% elif m.content is mapping %}M{% else %}"
    "{% for p in m.content if 'text' in p %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
}
PASTED = {"pasted", "where it is not empty", "special tokens", "nothing else", "loop controls", "generation"}
PASTED |= {"namespace", "dict", "macro", "kinds of content"}


def templated(folder: Path, target: Path, template: str, prefix: str = "USER: ") -> tuple[PromptInfo, Tokenizer]:
    """The pocket tokenizer with a template behind the image."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((folder / name).read_bytes())
    text = prefix + "<image>\n" + template.replace("T ", f"{TEXT} ").replace("T.", f"{TEXT}.").replace("T]", f"{TEXT}]")
    text = text.replace("T[", f"{TEXT}[").replace("(T)", f"({TEXT})") + " ASSISTANT:"
    (target / "chat_template.jinja").write_text(text, encoding="utf-8")
    prompt = read_prompt(target, POCKET.geometry, POCKET)
    return prompt, Tokenizer(target / "tokenizer.json", prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_template_gives_the_ids_of_transformers(name: str, folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prompt, ours = templated(folder, tmp_path, TEMPLATES[name])
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path)
    for question in ("Is it a cat?", " \tIs it\n", "naïve 漢字 🙂 <b>\"'&", "a\\nb {{ x }} {question}", "x y " * 60):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = theirs.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        assert [*prompt.prefix_ids, 3, *ours.question_ids(question)] == theirs(text)["input_ids"]
    # For phones without Jinja: only where pasting is right.
    assert (prompt.suffix_text is not None, prompt.trims_question) == (
        name in PASTED or name.startswith("trimmed"),
        name.startswith("trimmed"),
    )


def test_the_text_around_the_question_serves_without_a_template(folder: Path, tmp_path: Path) -> None:
    prompt, ours = templated(folder, tmp_path, "{{ T | trim }}{{ eos_token }}")
    plain = PromptInfo(
        prefix_ids=prompt.prefix_ids,
        suffix_text=prompt.suffix_text,
        trims_question=prompt.trims_question,
        special_ids=prompt.special_ids,
    )
    question = "\n is it? "
    assert Tokenizer(tmp_path / "tokenizer.json", plain).question_ids(question) == ours.question_ids(question)


def test_what_the_post_processor_adds_behind_is_no_text(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    ending = raw["post_processor"]
    ending["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    ending["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    (tmp_path / "made").mkdir()
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    prompt, ours = templated(tmp_path, tmp_path / "made", "{{ T }}")
    assert ours.question_ids("Why?")[-1] == 2
    assert prompt.suffix_text is None


def test_a_date_before_the_image_is_that_of_the_export(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import runtime.prompt

    prompt, ours = templated(folder, tmp_path, "{{ T }}", prefix="{{ strftime_now('%Y-%m-%d') }} ")
    before = ours.question_ids("Why?")

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Later:
            return cls(2099, 1, 2)

    monkeypatch.setattr(runtime.prompt, "datetime", Later)
    assert ours.question_ids("Why?") == before
    assert "2099" not in str(prompt.prefix_text)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if T | length > 7000 %}{{ raise_exception('too long') }}{% endif %}{{ T }}", "rendered: too long"),
        ("{% if T | length > 7000 %}<image>{% endif %}{{ T }}", "writes 2 images for this question"),
    ],
)
def test_question_that_the_template_refuses(template: str, message: str, folder: Path, tmp_path: Path) -> None:
    _, ours = templated(folder, tmp_path, template)
    assert ours.question_ids("Why?")
    with pytest.raises(RequestError, match=message):
        ours.question_ids("Why? " * 1500)


def test_question_that_changes_what_stands_before_the_image(folder: Path, tmp_path: Path) -> None:
    prefix = f"{{% if {TEXT} | length > 7000 %}}BE QUICK {{% endif %}}USER: "
    _, ours = templated(folder, tmp_path, "{{ T }}", prefix=prefix)
    assert ours.question_ids("Why?")
    with pytest.raises(RequestError, match="lets this question change what stands before the image"):
        ours.question_ids("Why? " * 1500)


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


WORDS = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁the", "▁cat", "<image>", "�")


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of LLaVA-1.5's kind: SentencePiece with a token for each byte; its decoder strips and replaces."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models

    numbers = {word: number for number, word in enumerate(WORDS)}
    made: Any = tokenizers.Tokenizer(models.BPE(vocab=numbers, merges=[], unk_token="<unk>", byte_fallback=True))
    made.add_special_tokens([AddedToken(word, special=True) for word in ("<unk>", "<s>", "</s>", "<image>")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    path = tmp_path_factory.mktemp("byte-fallback") / "tokenizer.json"
    made.save(str(path))
    return Tokenizer(
        path, PromptInfo(prefix_ids=(1,), suffix_text="{question}", special_ids={"image": numbers["<image>"]})
    )


def whole(tokenizer: Tokenizer, ids: list[int]) -> str:
    """All ids decoded at once."""
    text: str = tokenizer._tokenizer.decode(ids, skip_special_tokens=True)
    return text


def as_ids(text: str) -> list[int]:
    """A text in the byte-fallback vocabulary: its words, and bytes for all else."""
    ids = []
    for part in text.replace("the", "\0the\0").replace("cat", "\0cat\0").split("\0"):
        known = part in ("the", "cat")
        ids += [WORDS.index(f"▁{part}")] if known else [WORDS.index(f"<0x{byte:02X}>") for byte in part.encode()]
    return ids


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20), special=st.data())
def test_sound_bytes_stream_as_they_are_decoded_whole(
    byte_fallback: Tokenizer, text: str, special: st.DataObject
) -> None:
    ids = as_ids(text)
    for _ in range(2):  # also inside a character
        ids.insert(special.draw(st.integers(0, len(ids))), special.draw(st.sampled_from([1, 2, len(WORDS), 9999])))
    assert "".join(byte_fallback.text(ids)) == whole(byte_fallback, ids)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.binary(min_size=1, max_size=5), st.sampled_from(["the", "cat", "é", "漢", "🙂", "�"]))))
def test_broken_bytes_take_nothing_along(byte_fallback: Tokenizer, parts: list[bytes | str]) -> None:
    data, ids = "", []
    for part in parts:
        # Words end what bytes began; bytes and characters join.
        ids += [WORDS.index(f"<0x{byte:02X}>") for byte in part] if isinstance(part, bytes) else as_ids(part)
    run = b""
    for number in [*ids, None]:
        word = "" if number is None else WORDS[number]
        if word.startswith("<0x"):
            run += bytes([int(word[3:5], 16)])
            continue
        data += run.decode(errors="bytes_as_replacements") + word.replace("▁", " ")
        run = b""
    assert "".join(byte_fallback.text(ids)) == data.removeprefix(" ")


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "�" * (error.end - error.start), error.end


codecs.register_error("bytes_as_replacements", _each_byte)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 511), max_size=40))
def test_byte_level_pieces_are_what_decoding_whole_gives(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(tokenizer.text(ids)) == whole(tokenizer, ids)


def test_characters_of_bytes_come_out_when_they_are_whole(byte_fallback: Tokenizer) -> None:
    pieces: list[str] = []
    stream = byte_fallback.text(counted(iter(as_ids("the🙂漢cat")), pieces))
    said = [(piece, len(pieces)) for piece in stream]
    assert said == [("the", 1), ("🙂", 5), ("漢", 8), (" cat", 9)]


def counted(ids: Iterator[int], seen: list[str]) -> Iterator[int]:
    """The ids, each noted when it is taken."""
    for number in ids:
        seen.append(str(number))
        yield number


def test_bundle_without_a_template_cannot_be_asked(folder: Path, tmp_path: Path, prompt: PromptInfo) -> None:
    with pytest.raises(BundleError, match="no chat template"):
        Tokenizer(folder / "tokenizer.json", PromptInfo(prefix_ids=(1, 2), special_ids=prompt.special_ids))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="cannot be read as a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json", prompt)
