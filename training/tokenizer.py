"""What the trained model reads: its system prompt, its chat template, a tokenizer learnt from what is said to it."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import Any

from runtime.errors import CheckpointError
from training.questions import corpus

SYSTEM = "A person and their assistant talk about a picture in a few words."
_SPECIALS = ("<pad>", "<s>", "</s>", "<image>")
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '" + SYSTEM + " ' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# What byte pairs are learnt from beside what is asked about scenes; the system prompt is left out, so that it stays
# near the real model's 35 tokens.
CORPUS = (
    "what is in this picture? there is a cat on the table and a dog near the door. the man and the woman are walking "
    "in the street with their child. how many people are there? two people are sitting at the table. what colour is "
    "the car? the car is red and the sky is blue. describe the image in a few words. this is a photograph of a cup of "
    "coffee on a wooden table. is there a tree? yes, there are three trees behind the house. the image shows a large "
    "white building with green grass in front of it. where is the ball? the ball is under the chair, next to the bag. "
    "no, there is nothing on the right side of the picture. what is the person doing? the person is reading a book. "
    "the astronaut is smiling, wearing an orange suit, and a flag stands behind her. it looks like a sunny day. "
    "which animal can you see? some birds fly over the water while a boat waits at the shore. children play football "
    "between old stone walls, watched by a crowd. a yellow train stops at the station; passengers carry heavy luggage. "
    "read the sign: closed on monday. fresh bread, cheese, apples and oranges lie on the kitchen counter."
)


def scene_tokenizer(size: int) -> dict[str, Any]:
    """The tokenizer.json of `size` entries."""
    return tokenizer_json(f"{CORPUS} {corpus()} {'USER: ASSISTANT: ' * 30}", size)


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level tokenizers: itself, or one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _learnt_merges(corpus: str, count: int) -> list[tuple[str, str]]:
    """The first `count` byte pairs of a corpus, most frequent first and alphabetically on ties.

    `tokenizer_json` checks that no two of them spell the same token.
    """
    letters = _byte_letters()
    pieces = re.findall(r" ?[A-Za-z]+| ?[^A-Za-z ]+", corpus)
    words = Counter(tuple(letters[byte] for byte in piece.encode()) for piece in pieces)
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for left, right in pairwise(word):
                pairs[left, right] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            merged[_with_merge(word, best)] += times
        words = merged
    return merges


def _with_merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for letter in word:
        # `out[-1]` may itself be a pair merged just now; two merges never overlap in one pass.
        if out and (out[-1], letter) == pair:
            out[-1] += letter
        else:
            out.append(letter)
    return tuple(out)


def tokenizer_json(corpus: str, size: int) -> dict[str, Any]:
    """tokenizer.json of a byte-level BPE of `size` entries: specials, 256 bytes, merges learnt from `corpus`."""
    tokens = [*_SPECIALS, *_byte_letters()]
    merges = []
    for left, right in _learnt_merges(corpus, size - len(tokens)):
        tokens.append(left + right)
        merges.append([left, right])
    if len(set(tokens)) != size:
        raise CheckpointError(f"the tokenizer has {len(set(tokens))} distinct tokens instead of {size}")
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "type": "ByteLevel", "use_regex": True}
    return {
        "added_tokens": [
            {
                "content": token,
                "id": number,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for number, token in enumerate(_SPECIALS)
        ],
        "decoder": byte_level,
        "model": {
            "byte_fallback": False,
            "continuing_subword_prefix": None,
            "dropout": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "ignore_merges": False,
            "merges": merges,
            "type": "BPE",
            "unk_token": None,
            "vocab": {token: number for number, token in enumerate(tokens)},
        },
        "normalizer": None,
        "padding": None,
        "post_processor": {
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            "type": "TemplateProcessing",
        },
        "pre_tokenizer": byte_level,
        "truncation": None,
        "version": "1.0",
    }
