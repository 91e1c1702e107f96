"""What float16 cannot hold is found in float32, and islands make such a model right in float16."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.pruner_alone import Engine, opened
from export import cli
from export.backends import coreml, onnx, xnnpack
from export.backends.backend import Lower
from export.calibration import rendered_scene
from export.checkpoints import RandomCheckpoint, open_checkpoint
from export.families import MODELS
from export.families.family import Checkpoint
from export.graphs.decoder import Context, build_text_graphs, precise_modules
from export.graphs.vision import VisionEncoder, build_vision_encoder
from export.ranges import LARGEST, Island, Ranges, make_islands, measure
from pruning import PruneSpec, SpecError
from pruning.vlm_pruner.settings import Settings
from runtime.bundle import FLOAT16_LARGEST, Manifest, RangesInfo, read_bundle
from runtime.check.parity import BOUNDS, SUMS_IN_16_BITS
from runtime.engines.coreml import MAIN, read_package
from runtime.engines.executorch import accumulator_bits
from runtime.errors import ExportError
from runtime.image import preprocess
from runtime.text_graphs import TEXT_DECODER
from tests.sample_bundle import Sample, make_bundle
from tests.tiny_llava import TINY, tiny_tensors, write_tiny
from tests.wide_family import TINY_WIDE

MLP = "tower.layers.1.mlp"
TEXT_MLP = "layers.2.mlp"
PREFIX = (1, 7, 8)
OVERFLOWS = {"first": 2.0**16, "second": 2.0**-16}


def _text_weights(folder: Path, *, first: float = 1.0, second: float = 1.0) -> Path:
    """The tiny model, whose last decoder layer has an MLP that is multiplied in its middle and divided again."""
    tensors = tiny_tensors()
    for name, factor in (("up_proj.weight", first), ("up_proj.bias", first), ("down_proj.weight", second)):
        tensors[f"model.language_model.{TEXT_MLP}.{name}"] *= factor
    return write_tiny(folder, tensors=tensors)


def _weights(folder: Path, *, first: float = 1.0, second: float = 1.0, offset: float = 0.0) -> Path:
    """The tiny model, whose second tower layer has an MLP that is multiplied in its middle and divided again.

    With an `offset` all that enters the tower is as much larger.
    """
    tensors = tiny_tensors()
    tensors["model.vision_tower.embeddings.position_embedding.weight"] += offset
    layer = "model.vision_tower.encoder.layers.1.mlp"
    for name, factor in (("fc1.weight", first), ("fc1.bias", first), ("fc2.weight", second)):
        tensors[f"{layer}.{name}"] *= factor
    return write_tiny(folder, tensors=tensors)


def _checkpoint(folder: Path, *, first: float = 1.0, second: float = 1.0) -> Checkpoint:
    return open_checkpoint(TINY, weights=str(_weights(folder, first=first, second=second)), seed=0)


def _encoder(checkpoint: Checkpoint, precision: str, *, pruned: bool = True) -> VisionEncoder:
    spec = PruneSpec(grid=(4, 4), keep=8, settings=Settings(token_batch=2, channels=24)) if pruned else None
    return build_vision_encoder(checkpoint, TINY, spec, precision=precision, prefix_ids=PREFIX)


def _pixels(checkpoint: Checkpoint, count: int) -> list[torch.Tensor]:
    info = TINY.family.image(checkpoint.folder, checkpoint.geometry)
    return [torch.from_numpy(preprocess(rendered_scene(4 * number), info)) for number in range(count)]


def _run(encoder: VisionEncoder, engine: Engine, folder: Path, pixels: torch.Tensor) -> np.ndarray:
    """`key_1`, which every image token's path through tower, projector and decoder layers ends in."""
    folder.mkdir()
    lowers: dict[str, Lower] = {"coreml": coreml.lower, "executorch": xnnpack.lower, "onnxruntime": onnx.lower}
    written = lowers[engine]({"vision_encoder": encoder}, folder)["vision_encoder"]
    loaded = opened(encoder, "vision_encoder", written, engine, folder, threads=1)
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


@pytest.mark.slow
def test_layer_that_overflows_is_wrong_without_an_island_and_right_with_it(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "weights", **OVERFLOWS)
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
    make_islands(half, {MLP: precise.get_submodule(MLP)})
    assert isinstance(half.get_submodule(MLP), Island)
    assert _error(_eager(half, pixels[0]), expected) <= 5e-3
    # ONNX Runtime's CPU kernels keep such numbers in float32 by themselves; the island goes through it all the same.
    assert _error(_run(half, "onnxruntime", tmp_path / "onnx", pixels[0]), expected) <= 5e-3


def test_an_overflow_in_the_projector_makes_all_of_it_an_island() -> None:
    inside = "tower.projector.linear_1"
    largest = {inside: 2 * LARGEST, "tower.projector": 3.0, "tower.layers.0": 5.0}
    assert Ranges(largest, (inside,)).islands == ("tower.projector",)
    TINY.family.tower(TINY.geometry).get_submodule("projector.linear_1")  # the tower's names are these


def test_model_that_float16_holds_has_no_islands(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "weights")
    ranges = measure(_encoder(checkpoint, "fp32"), _pixels(checkpoint, 2))
    assert ranges.islands == ()
    assert 0 < ranges.largest[ranges.worst] < LARGEST
    assert not any(name.startswith("pruner") for name in ranges.largest)


def test_a_tower_without_a_layer_norm(tmp_path: Path) -> None:
    """Its norms take no mean out, so that float16 has nothing to spoil there."""
    encoder = build_vision_encoder(RandomCheckpoint(TINY_WIDE, seed=1), TINY_WIDE, None)
    assert measure(encoder, [torch.rand(TINY_WIDE.geometry.pixel_values)]).islands == ()


def test_numbers_between_the_modules_that_are_too_large_are_an_error(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "weights", first=2.0**12, second=2.0**12)
    with pytest.raises(ExportError, match=r"tower\.layers\.1.* of the vision graph reaches .*give --precision fp32"):
        _ = measure(_encoder(checkpoint, "fp32"), _pixels(checkpoint, 1)).islands


def test_weights_that_float32_does_not_hold_either(tmp_path: Path) -> None:
    checkpoint = _checkpoint(tmp_path / "weights", first=2.0**120, second=2.0**120)
    with pytest.raises(ExportError, match=r"NaN or infinite in float32, too.*take others with --weights"):
        measure(_encoder(checkpoint, "fp32", pruned=False), _pixels(checkpoint, 1))


def _without_and_with(engine: Engine, folder: Path) -> None:
    """An engine's results without the island, which are no numbers, and with it, which are right."""
    checkpoint = _checkpoint(folder / "weights", **OVERFLOWS)
    precise, half = (_encoder(checkpoint, precision, pruned=False) for precision in ("fp32", "fp16"))
    (pixels,) = _pixels(checkpoint, 1)
    expected = _eager(precise, pixels)
    assert not np.isfinite(_run(half, engine, folder / "without", pixels)).all()
    make_islands(half, {MLP: precise.get_submodule(MLP)})
    in_16_bits = engine == "executorch" and accumulator_bits() == 16
    most = BOUNDS[SUMS_IN_16_BITS if in_16_bits else "fp16"].most_rel
    assert most is not None
    assert _error(_run(half, engine, folder / "with", pixels), expected) <= most


@pytest.mark.slow
def test_island_in_xnnpack(tmp_path: Path) -> None:
    _without_and_with("executorch", tmp_path)


@pytest.mark.slow
def test_island_in_core_ml(tmp_path: Path) -> None:
    _without_and_with("coreml", tmp_path)
    precise_ones = {
        name: [
            operator.kind
            for operator in read_package(tmp_path / name / "vision_encoder.mlpackage").function(MAIN).declared()
            if operator.kind == "linear" and operator.dtype == "float32"
        ]
        for name in ("without", "with")
    }
    assert precise_ones == {"without": [], "with": ["linear", "linear"]}


@pytest.mark.parametrize(("islands", "says"), [((), "; no module needs fp32"), (("a", "b"), "; 2 modules .*: a, b")])
def test_manifest_holds_what_was_measured(islands: tuple[str, ...], says: str, tmp_path: Path) -> None:
    ranges = RangesInfo(worst_module="a.b", worst_value=12345.6, safety=2, photos=("one.jpg",), islands=islands)
    assert re.search(rf"a\.b reaches 1\.235e\+04 of 65504 \(safety factor 2\) on 1 photo{says}$", str(ranges))
    manifest = read_bundle(make_bundle(tmp_path / "sample", Sample())).manifest
    record = msgspec.to_builtins(msgspec.structs.replace(manifest, ranges=ranges))
    assert msgspec.convert(record, Manifest).ranges == ranges
    del record["ranges"]  # as in bundles of before
    assert msgspec.convert(record, Manifest) == manifest
    with pytest.raises(ValueError, match="must be finite"):
        msgspec.structs.replace(ranges, worst_value=float("inf"))


# Whole exports


def _export(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str, **factors: float) -> int:
    weights = _weights(folder / "weights", **factors)
    return _export_tiny(folder, weights, monkeypatch, "--only", "vision", *words)


def _export_tiny(folder: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    fixed = ["export", "--model", "tiny", "--keep", "all", "-q", "--output-dir", str(folder / "out")]
    text = [] if "--only" in words else ["--text-tokens", "192"]
    return cli.main([*fixed, *text, "--weights", str(weights), *words], version="0")


def _made(folder: Path) -> tuple[Manifest, str]:
    """The manifest and the report of the one bundle that was made."""
    (path,) = (folder / "out").iterdir()
    return read_bundle(path).manifest, (path / "report.md").read_text(encoding="utf-8")


def test_export_of_a_model_that_overflows_has_an_island(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _export(tmp_path, monkeypatch, "--backend", "onnx", "--precision", "fp16", **OVERFLOWS) == 0
    manifest, report = _made(tmp_path)
    ranges = manifest.ranges
    assert ranges is not None
    assert ranges.islands == (MLP,)
    assert ranges.worst_module.startswith(MLP)
    assert ranges.worst_value > FLOAT16_LARGEST
    assert len(ranges.photos) >= 4
    assert manifest.golden.photo in ranges.photos
    assert f"of 65504 (safety factor 2) on {len(ranges.photos)} photos; 1 module computed in fp32: {MLP}" in report


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_export_without_hazards_has_none(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _export(tmp_path, monkeypatch, "--backend", "onnx", "--precision", precision) == 0
    manifest, report = _made(tmp_path)
    if precision == "fp32":
        assert manifest.ranges is None
        assert "fp16 range" not in report
        return
    assert manifest.ranges is not None
    assert manifest.ranges.islands == ()
    assert 0 < manifest.ranges.worst_value < LARGEST
    assert "no module needs fp32" in report
    # Nothing but the record is other than without the check.
    monkeypatch.setattr("export.pipeline._Making._half", None)
    assert _export(tmp_path / "unchecked", monkeypatch, "--backend", "onnx", "--precision", precision) == 0
    unchecked, _ = _made(tmp_path / "unchecked")
    assert unchecked.ranges is None
    assert unchecked.graphs == manifest.graphs
    for file in manifest.needed_files:
        assert unchecked.files[file] == manifest.files[file]


def test_npu_has_no_float32_to_flee_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--backend", "qnn", "--soc", "snapdragon-8-gen-3"]
    assert _export(tmp_path, monkeypatch, *words, **OVERFLOWS) == 2
    said = capsys.readouterr().err
    assert f"error: {MLP}." in said
    assert " of the vision graph reaches " in said
    assert "in float16, which holds 65504" in said
    assert "take a backend that can compute such modules in float32: xnnpack, vulkan, onnx" in said
    assert not (tmp_path / "out").exists()


# The text graphs, which are measured while the desktop's outputs are made


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("--quant-text", "none", "--backend", "onnx"), marks=pytest.mark.slow),
        pytest.param(("--quant-text", "none", "--backend", "xnnpack"), marks=pytest.mark.slow),
        pytest.param(("--target", "ios"), marks=pytest.mark.slow),
    ],
    ids=lambda words: words[-1],
)
def test_text_graphs_that_overflow_have_an_island(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = _text_weights(tmp_path / "weights", **OVERFLOWS)
    assert _export_tiny(tmp_path, weights, monkeypatch, "--precision", "fp16", *words) == 0
    manifest, report = _made(tmp_path)
    ranges = manifest.text_ranges
    assert ranges is not None
    assert (ranges.islands, ranges.photos) == ((TEXT_MLP,), (manifest.golden.photo,))
    assert ranges.worst_module == f"{TEXT_MLP}.down_proj"
    assert ranges.worst_value > FLOAT16_LARGEST
    assert f"on 1 photo; 1 module computed in fp32: {TEXT_MLP}" in report
    assert manifest.ranges is not None
    assert manifest.ranges.islands == ()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_text_graphs_without_hazards(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = _text_weights(tmp_path / "weights")
    words = ("--backend", "onnx", "--quant-text", "none", "--precision", precision)
    assert _export_tiny(tmp_path, weights, monkeypatch, *words) == 0
    ranges = _made(tmp_path)[0].text_ranges
    if precision == "fp32":
        assert ranges is None
        return
    assert ranges is not None
    assert ranges.islands == ()
    assert 0 < ranges.worst_value < LARGEST


@torch.no_grad()
def test_what_the_text_graphs_would_be_without_the_island(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY, weights=str(_text_weights(tmp_path, **OVERFLOWS)), seed=0)
    context = Context(TINY.geometry, TINY.family.frame(range(7), TINY.geometry), keep=8, cut=2, text=24)
    decoder = build_text_graphs(checkpoint, context, precision="fp16")[TEXT_DECODER]
    chance = torch.Generator().manual_seed(0)
    inputs = [
        torch.full(info.shape, context.first_text)
        if info.dtype == "int64"
        else torch.randn(info.shape, generator=chance).to(getattr(torch, info.dtype))
        for info in decoder.input_infos()
    ]
    assert not decoder(*inputs)[0].isfinite().all()
    make_islands(decoder, precise_modules(checkpoint, [TEXT_MLP]))
    precise = build_text_graphs(checkpoint, context)[TEXT_DECODER]
    expected = precise(*(x.float() if x.is_floating_point() else x for x in inputs))[0]
    assert _error(decoder(*inputs)[0].numpy(), expected.numpy()) <= 5e-3


def test_text_graphs_on_an_npu_have_no_float32_to_flee_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = _text_weights(tmp_path / "weights", **OVERFLOWS)
    words = ("--backend", "qnn", "--soc", "snapdragon-8-gen-3")
    assert _export_tiny(tmp_path, weights, monkeypatch, *words) == 2
    assert f"error: {TEXT_MLP}.down_proj of the text graphs reaches " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_text_graphs_that_no_island_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = _text_weights(tmp_path / "weights", first=2.0**12, second=2.0**12)
    words = ("--backend", "onnx", "--quant-text", "none", "--precision", "fp16")
    assert _export_tiny(tmp_path, weights, monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert re.search(r"error: (layers\.2|norm) of the text graphs reaches .*give --precision fp32", said)


def test_layer_norm_that_float16_would_leave_little_of(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(TINY, weights=str(_weights(tmp_path, offset=300.0)), seed=0)
    with pytest.raises(ExportError, match=r"pre.*norm of the vision graph takes the mean out of numbers whose mean is"):
        measure(_encoder(checkpoint, "fp32"), _pixels(checkpoint, 1))
