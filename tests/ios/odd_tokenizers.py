"""Tokenizers of every kind that ios/BenchCore knows, and what the library makes of hard texts with them.

In the shape of tests/phones/vectors/tokens.json, which holds the three kinds that the models here have.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from runtime.bundle import PromptInfo
from runtime.prompt import TOKENIZER_FILE, Tokenizer
from tests.phones.make_vectors import CORPUS, QWEN, TEXTS

# White space of all sorts, letters with two spellings, what takes several bytes or code points, numbers of all sorts.
LETTERS = (
    "abcdefgh  ABC.,'\"!?-_0123456789\n\t\r\u00a0\u0085\u000b\u2003éßΩÅ\u212b\u0131日本語🙂👩\u200d👧ñ\u0301e\u0301"
    "한글\ufb01\u00bd\u00b2\u0663\u0967"
)
BEHAVIOURS = ("removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous")


def _texts(random: np.random.Generator) -> list[str]:
    made = ("".join(random.choice(list(LETTERS), size=random.integers(1, 60))) for _ in range(40))
    return [text for text in (*TEXTS, *made) if text.strip()]


def _trained(tokenizer: Any, texts: Sequence[str], special: Sequence[str] = (), **settings: Any) -> Any:
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=list(special), **settings)
    tokenizer.train_from_iterator([*CORPUS, *texts[::2]], trainer)
    return tokenizer


def _kinds(texts: Sequence[str]) -> Iterator[tuple[str, Any]]:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    metaspace: Any = pre_tokenizers.Metaspace
    undo: Any = decoders.Metaspace
    for scheme in ("always", "first", "never"):
        for split in (True, False):
            tokenizer: Any = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=False))
            tokenizer.pre_tokenizer = metaspace(prepend_scheme=scheme, split=split)
            tokenizer.decoder = undo(prepend_scheme=scheme, split=split)
            yield f"metaspace {scheme} {split}", _trained(tokenizer, texts, ["<unk>"])

    steps: dict[str, list[Any]] = {
        "digits one by one": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "digits together": [pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=True)],
    }
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for behaviour in BEHAVIOURS:
        for invert in (False, True):
            cut: Any = pre_tokenizers.Split
            steps[f"split {behaviour} {invert}"] = [cut(Regex(r"\s+|\p{N}"), behaviour, invert=invert), plain]
    for name, cutters in steps.items():
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cutters)
        tokenizer.decoder = decoders.ByteLevel()
        yield name, _trained(tokenizer, texts, initial_alphabet=alphabet)

    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    three = Regex(QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(three, "isolated"), plain])
    tokenizer.decoder = decoders.ByteLevel()
    yield "whole words before merges", _trained(tokenizer, texts, initial_alphabet=alphabet)

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.Replace(Regex("a+"), "a")]
    tokenizer.normalizer = normalizers.Sequence(marks)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    _trained(tokenizer, texts, ["<unk>"])
    tokenizer.add_tokens(
        [
            AddedToken("ab", normalized=True),
            AddedToken("gh", lstrip=True, normalized=False),
            AddedToken("!?", rstrip=True, normalized=False),
            AddedToken("AB", lstrip=True, rstrip=True, normalized=False),
            AddedToken("ABC", normalized=False),
        ]
    )
    yield "added tokens", tokenizer

    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=False))
    tokenizer.pre_tokenizer = metaspace(prepend_scheme="first", split=False)
    _trained(tokenizer, texts, ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], limit_alphabet=20)
    content = json.loads(tokenizer.to_str())
    # Bytes are tokens of the model, none that text is searched for.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    yield "single bytes", tokenizer

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    yield "no decoder", _trained(tokenizer, texts, initial_alphabet=alphabet)


def write_odd_tokenizers(folder: Path, *, seed: int) -> int:
    """Writes tokens.json into a folder; returns how many tokenizers it holds."""
    random = np.random.default_rng(seed)
    texts = _texts(random)
    cases = []
    for name, tokenizer in _kinds(texts):
        tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
        content = tokenizer.to_str()
        prompt = PromptInfo(
            prefix_ids=(),
            suffix_text="\n{question} ASSISTANT:",
            special_ids={"image": tokenizer.token_to_id("<image>")},
        )
        ours = Tokenizer(Path(TOKENIZER_FILE), prompt, content=content)
        questions = [{"text": text, "ids": ours.question_ids(text)} for text in texts]
        streams: list[Any] = [entry["ids"] for entry in questions[:12]]
        streams += [random.integers(0, tokenizer.get_vocab_size(), 30).tolist() for _ in range(20)]
        cases.append(
            {
                "name": name,
                "tokenizer": json.loads(content),
                "prompt": msgspec.to_builtins(prompt),
                "questions": questions,
                "answers": [{"ids": ids, "text": "".join(ours.text(ids))} for ids in streams],
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").write_text(json.dumps(cases, ensure_ascii=False), encoding="utf-8")
    return len(cases)
