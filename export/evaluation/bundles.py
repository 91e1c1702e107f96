"""Bundles, asked the same questions in their own engine, answer by answer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from export.evaluation.questions import QuestionSet
from export.evaluation.run import Cell
from runtime.ask import open_bundle
from runtime.bundle import Bundle, read_bundle
from runtime.errors import RequestError
from runtime.image import load_photo

# An answer is the few words that were asked for; what goes on behind them is wrong anyway.
MOST_TOKENS = 16


def bundle_at(path: Path, weights_sha256: str) -> Bundle:
    """Reads a bundle that is to be asked. RequestError for one of other weights than the desktop model's."""
    bundle = read_bundle(path)
    made_of = bundle.manifest.weights.sha256
    if made_of != weights_sha256:
        raise RequestError(
            f"{path} holds other weights than the model it is compared with (sha256 {(made_of or 'none')[:12]}, "
            f"here {weights_sha256[:12]}); give the bundle's own --model and --weights"
        )
    return bundle


def ask_bundle(bundle: Bundle, path: Path, questions: QuestionSet, *, told: Callable[[str, float], None]) -> Cell:
    """Puts every question to a bundle, greedily; an answer is right where it is the wanted one, letter for letter."""
    prune = bundle.manifest.prune
    right, kept = [], []
    with open_bundle(path) as opened:
        for number, photo in enumerate(questions.photos):
            seen = opened.see(load_photo(photo.photo))
            answers = []
            for line in photo.lines:
                said = "".join(opened.ask(seen, line.question, max_new_tokens=MOST_TOKENS))
                answers.append(said.strip() == line.answer)
            right.append(answers)
            kept.append(list(seen.kept) if prune.pruned else [])
            told(f"{path.name}, {number + 1} of {len(questions.photos)} photos", (number + 1) / len(questions.photos))
    key = hashlib.sha256(f"{bundle.key} {questions.sha256}".encode()).hexdigest()[:16]
    return Cell(
        key=key, name=path.name, keep=prune.keep, cut=prune.cut if prune.pruned else None, right=right, kept=kept
    )
