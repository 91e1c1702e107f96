"""The trained model's tokenizer: pocket's, with byte pairs learnt from what is said about scenes, too."""

from __future__ import annotations

from typing import Any

from export.models.pocket import CORPUS, tokenizer_json
from training.questions import corpus


def scene_tokenizer(size: int) -> dict[str, Any]:
    """The tokenizer.json of `size` entries."""
    return tokenizer_json(f"{CORPUS} {corpus()} {'USER: ASSISTANT: ' * 30}", size)
