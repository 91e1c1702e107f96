"""The held-out set: scenes, prints, pairs of shape and colour, and phrasings that training never sees, as a file."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

from PIL import Image

from training.answers import WHOLES
from training.questions import questions_about
from training.scenes import make_scene

SEED = 90
PHOTOS = 160
PER_PHOTO = 14


def write_held_out(folder: Path, *, photos: int = PHOTOS, seed: int = SEED) -> Path:
    """Renders the scenes into a folder, with questions.jsonl beside them; returns that file's path."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(photos):
        at = (seed, number)
        scene = make_scene(at, WHOLES[number % len(WHOLES)], held_out=True)
        name = f"{number:03}.webp"
        Image.fromarray(scene.pixels).save(folder / name, quality=92, method=6)
        for question in islice(questions_about(scene, at, held_out=True), PER_PHOTO):
            line = {"image": name, "question": question.text, "answer": question.answer, "category": question.category}
            lines.append(json.dumps(line))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
