"""The pocket model as it comes with the package: accepted by transformers, its tokens tell a photo's parts apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoints import open_checkpoint
from export.families.llava.config import LlavaGeometry
from export.golden import make_golden
from export.models.pocket import POCKET, pocket_folder
from runtime.image import load_photo, preprocess


@pytest.fixture(scope="module")
def folder() -> Path:
    """The checkpoint as it comes with the package."""
    return pocket_folder()


def test_it_is_small_and_what_the_table_says(folder: Path) -> None:
    assert (folder / "model.safetensors").stat().st_size <= 24e6
    assert json.loads((folder / "config.json").read_text()) == POCKET.config


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


def _image_tokens(folder: Path, photo: np.ndarray) -> torch.Tensor:
    """(576, 288): the hidden states that the pruner sees."""
    checkpoint = open_checkpoint(POCKET, weights=str(folder))
    pixels = preprocess(photo, POCKET.family.image(checkpoint.folder, checkpoint.geometry))
    golden = make_golden(checkpoint, POCKET, None, pixel_values=pixels)
    return torch.from_numpy(golden["vision_encoder.out.hidden"][0, 31:])


def _photo(name: str) -> np.ndarray:
    import skimage

    return load_photo(Path(skimage.__file__).parent / "data" / name)


def test_image_tokens_tell_parts_of_a_photo_apart(folder: Path) -> None:
    tokens = torch.nn.functional.normalize(_image_tokens(folder, _photo("astronaut.png")), dim=1)
    similarity = (tokens @ tokens.T)[~torch.eye(576, dtype=torch.bool)]
    low, middle, high = torch.quantile(similarity, torch.tensor([0.05, 0.5, 0.95])).tolist()
    assert low < 0.0 < middle < 0.3
    assert high > 0.6


def test_image_tokens_depend_on_the_photo_more_than_on_the_place(folder: Path) -> None:
    one, other = (_image_tokens(folder, _photo(name)) for name in ("astronaut.png", "coffee.png"))
    same_place = torch.nn.functional.cosine_similarity(one, other, dim=1)
    assert float(same_place.mean()) < 0.5
    # Patches of one colour differ by place alone; a photo's must differ by far more than that.
    flat = _image_tokens(folder, np.full((336, 336, 3), 90, np.uint8))
    assert _mean_similarity(flat) > 0.5 > 0.25 > _mean_similarity(one)


def _mean_similarity(tokens: torch.Tensor) -> float:
    unit = torch.nn.functional.normalize(tokens, dim=1)
    return float((unit @ unit.T).mean())


def test_opening_by_name_takes_it(folder: Path) -> None:
    checkpoint = open_checkpoint("pocket")
    assert checkpoint.folder == folder
    assert checkpoint.identity().id == "pocket"
