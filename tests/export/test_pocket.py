"""The pocket model as it comes with the package: accepted by transformers, its tokens tell a photo's parts apart."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoints import open_checkpoint
from export.evaluation.eager import EagerModel
from export.evaluation.questions import read_questions
from export.families.llava.config import LlavaGeometry
from export.models.pocket import POCKET, pocket_folder
from runtime.image import load_photo


@pytest.fixture(scope="module")
def folder() -> Path:
    """The checkpoint as it comes with the package."""
    return pocket_folder()


def test_it_is_small_and_what_the_table_says(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size <= 24e6
    assert json.loads((folder / "config.json").read_text()) == POCKET.config


def test_its_files_are_those_that_training_wrote(folder: Path) -> None:
    digests = json.loads((folder / "digests.json").read_text())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    del found["digests.json"]
    assert digests == found


def test_geometry_is_the_real_one_in_small(folder: Path) -> None:
    geometry = LlavaGeometry.from_config(POCKET.config)
    assert (geometry.grid, geometry.image_tokens, geometry.vision.patch_size) == ((24, 24), 576, 14)
    assert geometry.tower_layers == geometry.vision.layers - 1
    assert geometry.text.hidden > 256  # or the pruner's choice of channels would never be exercised


def test_transformers_loads_the_whole_folder(folder: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    assert model.dtype == torch.float16
    load: Any = AutoProcessor.from_pretrained
    processor = load(folder)
    inputs = processor(
        images=np.zeros((40, 50, 3), np.uint8), text="USER: <image>\nwhy? ASSISTANT:", return_tensors="pt"
    )
    assert int((inputs["input_ids"] == POCKET.geometry.image_token_id).sum()) == 576
    with torch.no_grad():
        logits = model.float()(**inputs).logits
    assert torch.isfinite(logits).all()


def test_tokenizer_reads_back_what_it_wrote(folder: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == POCKET.geometry.text.vocab
    for text in ("what is in this picture?", "Ünïcode, 漢字 and 🐈\n\ttabs", ""):
        ids = tokenizer.encode(text).ids
        assert ids[0] == 1
        assert tokenizer.decode(ids) == text


@torch.no_grad()
def test_it_answers_by_what_it_sees(folder: Path) -> None:
    """Of scenes that training never showed; asked about another one's photo it is wrong far more often."""
    assert POCKET.questions is not None
    photos = read_questions(POCKET.questions).first(6).photos
    model = EagerModel(open_checkpoint("pocket"), POCKET)

    def right(shift: int) -> float:
        answers = []
        for number, photo in enumerate(photos):
            shown = photos[(number + shift) % len(photos)].photo
            reading = model.read(load_photo(shown), photo.lines, [0])
            answers += model.right(reading, 0, None)
        return float(np.mean(answers))

    assert right(0) > 0.7
    assert right(1) < 0.5


def test_opening_by_name_takes_it(folder: Path) -> None:
    checkpoint = open_checkpoint("pocket")
    assert checkpoint.folder == folder
    assert checkpoint.identity().id == "pocket"
