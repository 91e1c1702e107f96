"""Whole exports of the pocket model: what lies in the bundle, and every choice of precision, backend and cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export.backends.xnnpack import XNNPACK
from export.checkpoints import FolderCheckpoint
from export.graphs.decoder import Context, build_text_graphs
from export.graphs.graph import Graph
from export.graphs.vision import build_vision_encoder
from export.models.pocket import POCKET, pocket_folder
from export.quantize import SCHEMES
from pruning import PruneSpec
from pruning.vlm_pruner.settings import Settings
from runtime.bundle import OWN_LAYOUT, REPORT_FILES, read_bundle
from runtime.golden import step_label, steps
from runtime.text_graphs import DECODER_FRONT, OPEN_GRAPHS
from tests.conftest import CommandLine
from tests.sample_bundle import noise_photo

GRAPH_FILES = {f"{name}.onnx" for name in (*OPEN_GRAPHS, DECODER_FRONT)} | {"weights.onnx_data"}
ON_DISK = {*GRAPH_FILES, "golden.safetensors", "tokenizer.json", "preprocessor_config.json", *REPORT_FILES}


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def test_bundle_holds_what_the_format_says(onnx_bundle: Path) -> None:
    bundle = read_bundle(onnx_bundle)
    bundle.check_files()
    assert {path.name for path in onnx_bundle.iterdir()} == {"manifest.json", *ON_DISK}
    assert set(bundle.manifest.files) == ON_DISK
    assert bundle.manifest.name == onnx_bundle.name
    assert bundle.manifest.weights.source == "checkpoint"
    assert {"pruneport", "python", "torch", "onnxruntime"} <= set(bundle.manifest.tools)


def test_outputs_are_static_and_pruned(onnx_bundle: Path) -> None:
    manifest = read_bundle(onnx_bundle).manifest
    outputs = {info.name: info.shape for info in manifest.graphs[0].outputs}
    prefix = len(manifest.prompt.prefix_ids)
    assert outputs["hidden"][:2] == (1, prefix + 64)
    assert outputs["positions"] == (1, prefix + 64)
    for name in ("key_0", "value_0", "key_1", "value_1"):
        assert outputs[name][2] == prefix + 576
    assert (manifest.prune.cut, manifest.prune.keep, manifest.prune.image_tokens) == (2, 64, 576)


def test_golden_is_named_as_the_format_says(onnx_bundle: Path) -> None:
    bundle = read_bundle(onnx_bundle)
    golden = bundle.golden()
    graph = bundle.graph("vision_encoder")
    for kind, infos in (("in", graph.inputs), ("out", graph.outputs)):
        for info in infos:
            assert golden[f"vision_encoder.{kind}.{info.name}"].shape == info.shape
    kept = golden["kept_indices"]
    assert kept.shape == (64,)
    assert (np.diff(kept) > 0).all()
    assert sorted(golden["kept_order"].tolist()) == kept.tolist()
    assert set(golden["marks"].tolist()) <= set(kept.tolist())
    assert golden["kept_margin"].shape == (64,)
    assert golden["photo"].dtype == np.uint8
    # Positions are the prefix's and then the kept tokens' own.
    prefix = len(bundle.manifest.prompt.prefix_ids)
    positions = golden["vision_encoder.out.positions"][0]
    assert positions.tolist() == [*range(prefix), *(kept + prefix)]


def test_report_says_passed(onnx_bundle: Path) -> None:
    steps = {step["name"]: step["status"] for step in read_json(onnx_bundle / "parity.json")["steps"]}
    assert set(steps.values()) == {"passed"}
    assert {"files", "preprocessing", "parity of vision_encoder", "kept tokens"} <= set(steps)
    assert read_json(onnx_bundle / "latency.json")["graphs"][0]["bundle"]["runs"] >= 5
    assert "http://" not in (onnx_bundle / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_twin_is_compared_in_one_run(xnnpack_bundle: Path) -> None:
    latency = read_json(xnnpack_bundle / "latency.json")
    graphs = read_bundle(xnnpack_bundle).manifest.graphs
    timed = [step_label(graph.name, step) for graph in graphs for step in steps(graph, OWN_LAYOUT)]
    assert [graph["graph"] for graph in latency["graphs"]] == timed
    assert len(timed) == 1 + 2 + 3 + 2 + 1
    for graph in latency["graphs"]:
        assert graph["twin"]["runs"] == graph["bundle"]["runs"]
        assert graph["ratio"]["median"] > 0
    assert latency["twin"]["image_tokens"] == 576
    twin = read_bundle(xnnpack_bundle.with_name("pocket-keepall-android-xnnpack"))
    twin.check_files()
    assert not twin.manifest.prune.pruned
    assert {step["status"] for step in read_json(twin.path / "parity.json")["steps"]} == {"passed"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--backend", "onnx", "--precision", "fp16"], "pocket-keep8-android-onnx-fp16"),
        (["--backend", "onnx", "--weights", "random", "--seed", "3"], "pocket-keep8-android-onnx-random"),
        (["--backend", "onnx", "--quant-text", "int4"], "pocket-keep8-android-onnx-text-int4"),
        (
            ["--backend", "onnx", "--quant-text", "int4", "--layout", "transformers.js"],
            "pocket-keep8-android-onnx-text-int4-transformers.js",
        ),
        (["--precision", "fp16"], "pocket-keep8-android-xnnpack-fp16"),
        (["--quant-vision", "8da8w", "--cut", "0"], "pocket-keep8-android-xnnpack-8da8w-cut0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_choice_passes(words: list[str], name: str, tmp_path: Path, command_line: CommandLine) -> None:
    fixed = ["export", "--model", "pocket", "--keep", "8", "--target", "android", "-q"]
    done = command_line(*fixed, *words, "--output-dir", tmp_path / "out", timeout_s=880)
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = read_bundle(tmp_path / "out" / name)
    bundle.check_files()
    if "random" in words:
        assert bundle.manifest.weights.seed == 3
        assert "random" in (bundle.path / "report.md").read_text(encoding="utf-8").lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--backend", "xnnpack"], "pocket-keep8-android-xnnpack-uniform"),
        (["--backend", "onnx"], "pocket-keep8-android-onnx-uniform"),
        (["--backend", "onnx", "--cut", "0"], "pocket-keep8-android-onnx-uniform-cut0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_method_goes_all_the_way(
    words: list[str], name: str, tmp_path: Path, command_line: CommandLine
) -> None:
    out, photo = tmp_path / "out", tmp_path / "photo.png"
    Image.fromarray(noise_photo()).save(photo)
    fixed = ["export", "--model", "pocket", "--keep", "8", "--target", "android", "--method", "uniform", "-q"]
    done = command_line(*fixed, *words, "--output-dir", out, timeout_s=880)
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = read_bundle(out / name)
    prune, golden = bundle.manifest.prune, bundle.golden()
    assert (prune.method, prune.settings, prune.pruned) == ("uniform", {}, True)
    assert golden["kept_indices"].tolist() == list(range(36, 576, 72))
    assert not [key for key in golden if key.startswith("recovery.")]
    parity = read_json(bundle.path / "parity.json")
    assert {step["name"]: step["status"] for step in parity["steps"]}["kept tokens"] == "passed"
    assert "uniform, " in (bundle.path / "report.md").read_text(encoding="utf-8")
    done = command_line("ask", bundle.path, photo, "What is this?", "--max-new-tokens", "4", "-q", timeout_s=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


@pytest.mark.slow
def test_weights_of_all_graphs_are_stored_once(tmp_path: Path, one_thread: None) -> None:
    """Five graphs hold the decoder's layers, quantised in the vision graph as in the others, and the file one copy."""
    scheme = "8da4w-g32"
    checkpoint = FolderCheckpoint(pocket_folder(), POCKET)
    # A limit that everything is below, and batches of the whole image: few steps, so that lowering takes seconds.
    spec = PruneSpec(keep=64, settings=Settings(threshold=2.0, token_batch=64, steps=4))
    vision = build_vision_encoder(checkpoint, POCKET, spec, quant_layers=scheme)
    context = Context(checkpoint.geometry, vision.frame, keep=64, cut=2, text=192)
    graphs: dict[str, Graph] = {"vision_encoder": vision, **build_text_graphs(checkpoint, context, quant=scheme)}
    # Not weights: rotary tables, masks, and the prefix's keys and values, each counted where it lies in memory.
    constants = {
        buffer.data_ptr(): buffer.numel() * buffer.element_size()
        for graph in graphs.values()
        for buffer in graph.buffers()
    }
    weights_bytes, group = 0, SCHEMES[scheme].group
    assert group
    for name in (name for name, entry in POCKET.tensors.items() if entry.needed):
        tensor = checkpoint.tensor(name)
        if name.startswith(("layers.0.self_attn.", "layers.1.self_attn.")):  # below the cut attention has 8 bits
            weights_bytes += tensor.numel() + len(tensor) * 4
        elif tensor.dim() == 2 and name.startswith(("layers.", "lm_head.")):
            weights_bytes += tensor.numel() // 2 + tensor.numel() // group * 2  # 4 bits each, 16 for a group's scale
        else:
            weights_bytes += tensor.numel() * 4
    (tmp_path / "out").mkdir()
    lowered = XNNPACK.lower(graphs, tmp_path / "out")
    assert {graph.file for graph in lowered.values()} == {"model.pte"}
    assert (tmp_path / "out" / "model.pte").stat().st_size <= 1.05 * weights_bytes + sum(constants.values())
