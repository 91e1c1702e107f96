"""What float16 cannot hold is found in float32, and islands make such a model right in float16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from export.backends import onnx
from export.calibration import default_photos
from export.checkpoints import Checkpoint, open_checkpoint
from export.graphs.vision import VisionEncoder, build_vision_encoder
from export.models.llava import image_info
from export.ranges import LARGEST, Island, make_islands, measure
from pruning import PruneSpec, SpecError
from runtime.bundle import GraphInfo
from runtime.engines import ENGINES
from runtime.errors import ExportError
from runtime.image import preprocess
from tests.tiny_llava import TINY, tiny_tensors, write_tiny

MLP = "tower.layers.1.mlp"
PREFIX = (1, 7, 8)


def _checkpoint(folder: Path, *, first: float = 1.0, second: float = 1.0) -> Checkpoint:
    """The tiny model, whose second tower layer has an MLP that is multiplied in its middle and divided again."""
    tensors = tiny_tensors()
    layer = "model.vision_tower.encoder.layers.1.mlp"
    for name, factor in (("fc1.weight", first), ("fc1.bias", first), ("fc2.weight", second)):
        tensors[f"{layer}.{name}"] *= factor
    return open_checkpoint(TINY, weights=str(write_tiny(folder, tensors=tensors)), seed=0)


def _encoder(checkpoint: Checkpoint, precision: str) -> VisionEncoder:
    spec = PruneSpec(grid=(4, 4), keep=8, token_batch=2, channels=24)
    return build_vision_encoder(
        checkpoint, TINY, spec, placement="decoder", layer=2, precision=precision, prefix_ids=PREFIX
    )


def _pixels(checkpoint: Checkpoint, count: int) -> list[torch.Tensor]:
    info = image_info(checkpoint, TINY)
    return [torch.from_numpy(preprocess(photo, info)) for photo in list(default_photos().values())[:count]]


def _run(encoder: VisionEncoder, folder: Path, pixels: torch.Tensor) -> np.ndarray:
    """`key_1`, which every image token's path through tower, projector and decoder layers ends in."""
    folder.mkdir()
    written = onnx.lower({"vision_encoder": encoder}, folder)["vision_encoder"]
    info = GraphInfo(
        name="vision_encoder",
        file=written.file,
        extra_files=written.extra_files,
        engine="onnxruntime",
        inputs=encoder.input_infos(),
        outputs=encoder.output_infos(),
    )
    extra = tuple(folder / name for name in written.extra_files)
    loaded = ENGINES[info.engine](info, folder / written.file, extra, 1)
    out = dict(zip(encoder.output_names, loaded.run([pixels.numpy()]), strict=True))["key_1"].astype(np.float32)
    loaded.close()
    return out


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def _eager(encoder: VisionEncoder, pixels: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        out = dict(zip(encoder.output_names, encoder(pixels), strict=True))["key_1"]
    shown: np.ndarray = out.float().numpy()
    return shown


def test_layer_that_overflows_is_wrong_without_an_island_and_right_with_it(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "weights", first=2.0**16, second=2.0**-16)
    precise = _encoder(checkpoint, "fp32")
    pixels = _pixels(checkpoint, 2)
    ranges = measure(precise, pixels)
    assert ranges.islands == (MLP,)
    assert ranges.worst.startswith(MLP)
    assert ranges.largest[ranges.worst] > 65504
    expected = _eager(precise, pixels[0])
    half = _encoder(checkpoint, "fp16")
    with pytest.raises(SpecError, match=r"keys holds .* values that are NaN or infinite"):
        _eager(half, pixels[0])
    make_islands(half, precise, ranges.islands)
    assert isinstance(half.get_submodule(MLP), Island)
    assert _error(_eager(half, pixels[0]), expected) <= 5e-3
    # ONNX Runtime's CPU kernels keep such numbers in float32 by themselves; the island goes through it all the same.
    assert _error(_run(half, tmp_path / "onnx", pixels[0]), expected) <= 5e-3


def test_model_that_float16_holds_has_no_islands(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "weights")
    ranges = measure(_encoder(checkpoint, "fp32"), _pixels(checkpoint, 2))
    assert ranges.islands == ()
    assert 0 < ranges.largest[ranges.worst] < LARGEST
    assert not any(name.startswith("pruner") for name in ranges.largest)


def test_numbers_between_the_modules_that_are_too_large_are_an_error(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "weights", first=2.0**12, second=2.0**12)
    with pytest.raises(ExportError, match=r"tower\.layers\.1.* of the vision graph reaches .*give --precision fp32"):
        measure(_encoder(checkpoint, "fp32"), _pixels(checkpoint, 1))
