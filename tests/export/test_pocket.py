"""The pocket model: same bytes everywhere, accepted by transformers, image tokens that tell a photo's parts apart."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.checkpoints import open_checkpoint
from export.families.llava.config import LlavaGeometry
from export.golden import make_golden
from export.models.pocket import POCKET, pocket_cache, pocket_folder, write_pocket
from runtime.errors import OutputError
from runtime.image import load_photo, preprocess

# Written on x86-64 with numpy 2.3; another machine or version that gets other bytes must fail here, not quietly
# disagree with a golden file.
WEIGHTS_SHA256 = "16637a672efe5c803bcc99a692af7ae3854fa43747066029c35c57145c5cf274"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint in a cache of its own."""
    return pocket_folder(tmp_path_factory.mktemp("cache"))


def test_bytes_never_change(folder: Path, tmp_path: Path) -> None:
    write_pocket(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256
    assert sum(path.stat().st_size for path in folder.iterdir()) < 9e6


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
    return torch.from_numpy(golden["vision_encoder.out.hidden"][0, 35:])


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


def test_cache_is_reused_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    folder = pocket_folder(tmp_path)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert pocket_folder(tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    damaged = bytearray((folder / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (folder / "model.safetensors").write_bytes(damaged)
    pocket_folder(tmp_path)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == WEIGHTS_SHA256
    (folder / "tokenizer.json").unlink()
    pocket_folder(tmp_path)
    assert json.loads((folder / "tokenizer.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.models.pocket.pocket_tensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pocket_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="set PRUNEPORT_CACHE"):
        pocket_folder(tmp_path / "file" / "cache")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEPORT_CACHE", str(tmp_path / "own"))
    assert pocket_cache() == tmp_path / "own"
    monkeypatch.delenv("PRUNEPORT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert pocket_cache() == tmp_path / "shared" / "pruneport"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert pocket_cache() == Path(os.path.expanduser("~")) / ".cache" / "pruneport"


def test_opening_by_name_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNEPORT_CACHE", str(tmp_path))
    checkpoint = open_checkpoint("pocket")
    assert checkpoint.identity().sha256 == WEIGHTS_SHA256
    assert "untrained" in checkpoint.identity().id
