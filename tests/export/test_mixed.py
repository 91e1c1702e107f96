"""Vision and text by different backends: what can be asked for, what is made, and that it passes its check."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import export.families
from export import pipeline
from export.checkpoints import RandomCheckpoint
from export.graphs.vision import build_vision_encoder
from export.progress import Progress
from export.request import Plan, Request, check_memory, describe, plan
from runtime.bundle import OWN_LAYOUT, Bundle, MadeInfo, read_bundle
from runtime.errors import BundleError, NotYetError, RequestError
from runtime.generation import open_graphs, start_answers
from runtime.golden import ANSWER, PIXELS, QUESTION, input_key, step_label, steps
from runtime.harness import verify
from runtime.text_graphs import DECODER_BACK, DECODER_FRONT, LM_HEAD, VISION_ENCODER
from tests.conftest import needs_chromium
from tests.sample_bundle import edit_manifest
from tests.wide_family import TINY_WIDE

CHIP = "snapdragon-8-gen-3"


def planned(folder: Path, backend: str, **words: Any) -> Plan:
    fields = {"model": "pocket", "keep": "16", "target": "android", "output_dir": str(folder), **words}
    return plan(Request(backend=backend, **fields))


@pytest.mark.parametrize(
    ("backend", "words", "message"),
    [
        ("vision=onnx", {}, "backend='vision=onnx' says nothing of text; write vision=...,text=..., or one word for"),
        ("text=onnx", {}, "says nothing of vision; write vision=...,text=..."),
        ("vision=onnx,txet=xnnpack", {}, "unknown part 'txet', did you mean 'text'?; allowed: vision, text"),
        ("vision=onnx, text=xnnpack", {}, "unknown part ' text', did you mean 'text'?"),
        ("vision=onnx,vision=xnnpack", {}, "names vision twice; write vision=...,text=..."),
        ("vision=onnx,text=xnnpack,text=xnnpack", {}, "names text twice"),
        ("onnx,xnnpack", {}, "has no part or no name in 'onnx'; write vision=...,text=..., or one word"),
        ("vision=onnx,", {}, "has no part or no name in ''"),
        ("vision=,text=onnx", {}, "has no part or no name in 'vision='"),
        ("=onnx", {}, "has no part or no name in '=onnx'"),
        ("vision=onx,text=xnnpack", {}, "unknown android backend 'onx', did you mean 'onnx'?; allowed: xnnpack,"),
        ("vision=onnx,text=a=b", {}, "unknown android backend 'a=b'"),
        ("vision=onnx,text=coreml", {}, "unknown android backend 'coreml'; allowed: xnnpack, vulkan, onnx"),
        ("vision=coreml,text=xnnpack", {"target": "ios"}, "unknown ios backend 'xnnpack'; allowed: coreml, executorch"),
        (
            "vision=onnx,text=xnnpack",
            {"only": "vision"},
            "names the text graphs, which --only leaves out; write vision=",
        ),
        ("vision=onnx,text=xnnpack", {"soc": CHIP}, f"soc={CHIP} means nothing to backend onnx or xnnpack of target"),
        ("vision=onnx,text=xnnpack", {"min_ios": "18"}, "min_ios=18 means nothing to backend onnx or xnnpack"),
        ("vision=qnn,text=xnnpack", {}, "backend qnn compiles for one chip; name it with --soc"),
        ("vision=coreml,text=executorch", {"target": "ios", "min_ios": "17"}, "unknown min_ios '17'; allowed: 18"),
        (
            "vision=onnx,text=xnnpack",
            {"layout": "transformers.js"},
            "layout=transformers.js is not made by backend onnx and xnnpack; take --backend onnx, or leave --layout",
        ),
        ("vision=onnx,text=xnnpack", {"quant_text": "int4"}, "unknown xnnpack quant_text 'int4'; allowed: 8da4w,"),
        ("vision=xnnpack,text=onnx", {"quant_vision": "int4"}, "unknown xnnpack quant_vision 'int4'; allowed: 8da8w"),
        (
            "vision=xnnpack,text=onnx",
            {"quant_vision": "8da8w", "precision": "fp16"},
            "precision=fp16 does not go with quant_vision=8da8w: xnnpack quantises only what comes in fp32",
        ),
        ("vision=onnx,text=xnnpack", {"calibration": "photos"}, "calibration=photos has nothing to calibrate"),
        ("vision=qnn,text=xnnpack", {"soc": CHIP, "precision": "fp32"}, "unknown qnn precision 'fp32'; allowed: fp16"),
        ("vision=onnx,text=webgpu", {"precision": "fp16"}, "unknown webgpu precision 'fp16'; allowed: fp32"),
        ("vision=onnx,text=xnnpack", {"precision": "vision=fp16"}, "precision='vision=fp16' says nothing of text"),
        ("onnx", {"precision": "vision=fp16,text=fp32"}, "two precisions, but backend onnx makes both parts in one"),
        (
            "vision=nnapi,text=xnnpack",
            {"model": "llava-1.5-13b", "weights": "random"},
            "vision_encoder of llava-1.5-13b has about",
        ),
        (
            "vision=xnnpack,text=nnapi",
            {"model": "llava-1.5-7b", "weights": "random"},
            "of weights in fp32; a file of backend nnapi holds its weights itself",
        ),
    ],
)
def test_pairs_that_mean_nothing(backend: str, words: Mapping[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        planned(tmp_path, backend, **words)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_scheme_that_this_part_has_not_yet(tmp_path: Path) -> None:
    with pytest.raises(NotYetError, match=r"quant_vision=8da8w: not yet on backend nnapi; .*: xnnpack, onnx, qnn"):
        planned(tmp_path, "vision=nnapi,text=xnnpack", quant_vision="8da8w")


@pytest.mark.parametrize(
    ("backend", "words", "name"),
    [
        ("vision=onnx,text=xnnpack", {}, "pocket-keep16-android-vision-onnx-text-xnnpack"),
        ("text=xnnpack,vision=onnx", {}, "pocket-keep16-android-vision-onnx-text-xnnpack"),
        ("vision=onnx,text=onnx", {}, "pocket-keep16-android-onnx"),
        ("vision=onnx", {"only": "vision"}, "pocket-keep16-android-onnx-vision"),
        ("vision=qnn,text=xnnpack", {"soc": CHIP}, f"pocket-keep16-android-vision-qnn-text-xnnpack-{CHIP}"),
        ("vision=xnnpack,text=qnn", {"soc": CHIP}, f"pocket-keep16-android-vision-xnnpack-text-qnn-{CHIP}"),
        (
            "vision=vulkan,text=xnnpack",
            {"precision": "vision=fp16,text=fp32"},
            "pocket-keep16-android-vision-vulkan-text-xnnpack-fp16",
        ),
        (
            "vision=vulkan,text=xnnpack",
            {"precision": "fp16", "quant_text": "8da8w"},
            "pocket-keep16-android-vision-vulkan-text-xnnpack-fp16-text-fp16-text-8da8w",
        ),
        ("vision=coreml,text=executorch", {"target": "ios"}, "pocket-keep16-ios-vision-coreml-text-executorch"),
    ],
)
def test_names_say_both(backend: str, words: Mapping[str, str], name: str, tmp_path: Path) -> None:
    assert planned(tmp_path, backend, **words).bundle.name == name


@pytest.mark.parametrize(
    ("backend", "words", "vision", "text", "cache"),
    [
        # Each part computes as its own backend makes it; the layers below the cut are the vision graph's.
        ("vision=onnx,text=xnnpack", {}, ("fp32",), ("8da4w",), "float32"),
        ("vision=onnx,text=xnnpack", {"quant_text": "none"}, ("fp32",), ("fp32",), "float32"),
        ("vision=onnx,text=xnnpack", {"quant_vision": "int8"}, ("int8",), ("8da4w",), "float32"),
        ("vision=qnn,text=xnnpack", {"soc": CHIP}, ("fp16",), ("8da4w",), "float32"),
        ("vision=qnn,text=xnnpack", {"soc": CHIP, "quant_vision": "a16w8"}, ("a16w8",), ("8da4w",), "float32"),
        ("vision=xnnpack,text=onnx", {"quant_vision": "8da8w", "quant_text": "int4"}, ("8da8w",), ("int4",), "float32"),
        (
            "vision=vulkan,text=xnnpack",
            {"precision": "vision=fp16,text=fp32", "quant_text": "none"},
            ("fp16",),
            ("fp32",),
            "float32",
        ),
        # Where the cache is float16, keys and values are rounded to it as they leave the vision graph.
        (
            "vision=webgpu,text=xnnpack",
            {"precision": "vision=fp32,text=fp16", "quant_text": "none"},
            ("fp32", "fp16"),
            ("fp16",),
            "float16",
        ),
        (
            "vision=webgpu,text=xnnpack",
            {"precision": "vision=fp32,text=fp16", "quant_text": "none", "cut": "0"},
            ("fp32",),
            ("fp16",),
            "float16",
        ),
        ("vision=executorch,text=coreml", {"target": "ios"}, ("fp16",), ("int4",), "float16"),
        # With one backend they are quantised with the text graphs, whose weights they share.
        ("xnnpack", {}, ("8da8w", "8da4w-g32"), ("8da4w",), "float32"),
        ("xnnpack", {"quant_vision": "none"}, ("fp32", "8da8w", "8da4w-g32"), ("8da4w",), "float32"),
        ("vision=xnnpack,text=xnnpack", {}, ("8da8w", "8da4w-g32"), ("8da4w",), "float32"),
    ],
)
def test_a_plan_says_what_each_part_computes_in(
    backend: str, words: Mapping[str, str], vision: tuple[str, ...], text: tuple[str, ...], cache: str, tmp_path: Path
) -> None:
    made = planned(tmp_path, backend, model="llava-1.5-7b", weights="random", force=True, **words)
    assert (made.arithmetic(VISION_ENCODER), made.arithmetic(DECODER_BACK)) == (vision, text)
    assert made.cache == cache
    assert made.mixed == (len({recipe.backend.name for recipe in made.parts.values()}) > 1)


def test_states_are_those_of_the_text_graphs_backend(tmp_path: Path) -> None:
    assert planned(tmp_path, "vision=executorch,text=coreml", target="ios", precision="fp16").states
    assert not planned(tmp_path, "vision=coreml,text=executorch", target="ios", precision="fp16").states


def test_a_plan_tells_both_and_what_less_memory_would_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(tmp_path, "vision=qnn,text=xnnpack", soc=CHIP, quant_text="8da8w")
    assert (
        "  target   android, vision qnn (onnxruntime), fp16, for snapdragon-8-gen-3 (SM8650, HTP v75) alone; "
        "text xnnpack (executorch), fp32, 8da8w\n"
    ) in describe(made)
    monkeypatch.setattr("export.memory.available_bytes", lambda: 2**30)
    large = planned(tmp_path, "vision=onnx,text=xnnpack", model="llava-1.5-7b", weights="random")
    with pytest.raises(RequestError, match=r"--only vision --backend onnx \(about .* --cut 0 --only vision --backend"):
        check_memory(large)


def test_needs_are_those_of_both(tmp_path: Path) -> None:
    def needs(backend: str, **words: str) -> tuple[int, int]:
        made = planned(
            tmp_path, backend, model="llava-1.5-7b", weights="random", force=True, quant_text="none", **words
        )
        return made.needs.ram_bytes, made.needs.disk_bytes

    # Both read weights late, and in float32 the vision graph takes the same with either. Two backends share no file.
    mixed, alone = needs("vision=onnx,text=xnnpack"), needs("xnnpack")
    large = export.families.MODELS["llava-1.5-7b"]
    below = large.vision_parameter_count(2) - large.vision_parameter_count(0)
    assert mixed == (alone[0] + 4 * below, alone[1] + 4 * below)
    half = needs("vision=vulkan,text=xnnpack", precision="vision=fp16,text=fp32")
    assert needs("vulkan", precision="fp16") < half < needs("vulkan", precision="fp32")
    ios = {"target": "ios"}
    assert needs("coreml", **ios)[0] < needs("vision=coreml,text=executorch", **ios)[0] < needs("executorch", **ios)[0]


@pytest.mark.parametrize(("precision", "cache"), [("fp16", "float32"), ("fp32", "float16"), ("fp32", "float32")])
@torch.no_grad()
def test_keys_and_values_leave_in_the_dtype_of_the_cache(precision: str, cache: str) -> None:
    checkpoint = RandomCheckpoint(TINY_WIDE, seed=1)
    plain, cast = (
        build_vision_encoder(checkpoint, TINY_WIDE, None, precision=precision, cache=dtype, index=index)
        for dtype, index in ((None, None), (cache, "int32"))
    )
    pixels = torch.rand(TINY_WIDE.geometry.pixel_values, generator=torch.Generator().manual_seed(0))
    for info, before, after in zip(cast.output_infos(), plain(pixels), cast(pixels), strict=True):
        assert info.fits(str(after.dtype).removeprefix("torch."), tuple(after.shape)), info
        if info.name.startswith(("key_", "value_")):
            assert info.dtype == cache
        if info.name == "positions":
            assert info.dtype == "int32"
        assert torch.equal(before.to(after.dtype), after)


# Whole exports, of the tests' own family


def exported(folder: Path, backend: str, monkeypatch: pytest.MonkeyPatch, **words: str) -> pipeline.Made:
    monkeypatch.setattr(export.families, "MODELS", {TINY_WIDE.name: TINY_WIDE})
    fixed = {"model": TINY_WIDE.name, "keep": "7", "weights": "random", "text_tokens": "192"}
    made = planned(folder, backend, **fixed, **words)
    return pipeline.export(made, progress=Progress(stages=7, quiet=True), version="0")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pipeline.Made]:
    """Vision for ONNX Runtime, text for ExecuTorch; not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        yield exported(tmp_path_factory.mktemp("mixed"), "vision=onnx,text=xnnpack", patch, quant_text="8da8w")


def greedy(bundle: Bundle) -> list[int]:
    golden = bundle.golden()
    with open_graphs(bundle) as graphs:
        answers = start_answers(bundle, graphs)
        photo = answers.see(golden[input_key(VISION_ENCODER, PIXELS)])
        return [
            token.id
            for token in answers.answer(
                photo, golden[QUESTION].tolist(), max_new_tokens=len(golden[ANSWER]), past_end=True
            )
        ]


@pytest.mark.slow
def test_it_passes_its_check_and_says_who_made_what(mixed: pipeline.Made) -> None:
    steps = {step.name: step.status for step in mixed.verdict.steps}
    assert set(steps.values()) == {"passed"}, steps
    manifest = mixed.bundle.manifest
    assert (manifest.target.backend, manifest.target.quant_text) == ("onnx", "8da8w")
    assert manifest.target.text == MadeInfo(backend="xnnpack", precision="fp32")
    made = {graph.name: (graph.engine, graph.file.split("/")[0], graph.arithmetic) for graph in manifest.graphs}
    assert made[VISION_ENCODER] == ("onnxruntime", "vision", ("fp32",))
    assert made[DECODER_FRONT] == made[DECODER_BACK] == made[LM_HEAD] == ("executorch", "text", ("8da8w",))
    bounds = {graph.graph: graph.bound.precision for graph in mixed.verdict.graphs}
    assert (bounds[VISION_ENCODER], bounds["decoder_back at text_prefill"]) == ("fp32", "8da8w")
    assert mixed.verdict.answers is not None
    assert mixed.verdict.answers.bundle.engine.startswith("onnxruntime ")
    assert " and executorch " in mixed.verdict.answers.bundle.engine
    report = (mixed.bundle.path / "report.md").read_text(encoding="utf-8")
    assert "(vision onnx, fp32; text xnnpack, fp32, 8da8w), pruned at cut 2" in report
    delegates = {placed.graph: set(placed.delegates) for placed in mixed.verdict.placements}
    assert (delegates[VISION_ENCODER], delegates[DECODER_BACK]) == (set(), {"XnnpackBackend"})


@pytest.mark.slow
def test_it_answers(mixed: pipeline.Made) -> None:
    assert mixed.verdict.answer is not None
    got = greedy(mixed.bundle)
    assert sum(a == b for a, b in zip(got, mixed.bundle.golden()[ANSWER].tolist(), strict=True)) >= 1
    assert verify(mixed.bundle.path).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("graph", "kind", "name", "changes", "message"),
    [
        (VISION_ENCODER, "outputs", "key_1", {"dtype": "float16"}, "key_1 float16[1, 2, 20, 8], which is no part of"),
        (VISION_ENCODER, "outputs", "value_0", {"shape": [1, 2, 20, 9]}, "which is no part of the text graphs' past_"),
        (VISION_ENCODER, "outputs", "value_0", {"shape": [20, 8]}, "which is no part of the text graphs' past_value_0"),
        (VISION_ENCODER, "outputs", "key_0", {"name": "key_9"}, "key_9 float32[1, 2, 20, 8], but the text graphs have"),
        (VISION_ENCODER, "outputs", "positions", {"dtype": "int64"}, "positions int64[1, 12], but decoder_back takes"),
        (VISION_ENCODER, "outputs", "hidden", {"shape": [1, 12, 33]}, "hidden float32[1, 12, 33], but decoder_back"),
        (
            VISION_ENCODER,
            "outputs",
            "hidden",
            {"name": "hid"},
            "decoder_back takes hidden float32[1, <=128, 32], which",
        ),
        (DECODER_BACK, "outputs", "key_2", {"dtype": "float16"}, "decoder_back hands on key_2 float16"),
    ],
)
def test_graphs_that_do_not_belong_together_are_refused(
    graph: str,
    kind: str,
    name: str,
    changes: dict[str, Any],
    message: str,
    mixed: pipeline.Made,
    tmp_path: Path,
) -> None:
    broken = shutil.copytree(mixed.bundle.path, tmp_path / mixed.bundle.path.name)
    graphs = msgspec.to_builtins(mixed.bundle.manifest.graphs)
    (info,) = (info for each in graphs if each["name"] == graph for info in each[kind] if info["name"] == name)
    info |= changes
    edit_manifest(broken, graphs=graphs)
    with pytest.raises(BundleError) as caught, open_graphs(read_bundle(broken)):
        pass
    assert message in str(caught.value)
    assert str(caught.value).endswith("its graphs are of different exports: export again")


@pytest.mark.slow
def test_a_check_refuses_such_a_bundle_too(mixed: pipeline.Made, tmp_path: Path) -> None:
    broken = shutil.copytree(mixed.bundle.path, tmp_path / mixed.bundle.path.name)
    graphs = msgspec.to_builtins(mixed.bundle.manifest.graphs)
    (info,) = (info for info in graphs[0]["outputs"] if info["name"] == "key_0")
    info["dtype"] = "float16"
    edit_manifest(broken, graphs=graphs)
    with pytest.raises(BundleError, match=r"hands on key_0 float16.*export again"):
        verify(broken)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("software_gpu")
@pytest.mark.parametrize(
    ("backend", "words", "engines"),
    [
        pytest.param("vision=webgpu,text=onnx", {}, {"onnxruntime"}, marks=needs_chromium),
        pytest.param("vision=onnx,text=webgpu", {}, {"onnxruntime"}, marks=needs_chromium),
        ("vision=qnn,text=xnnpack", {"soc": CHIP}, {"onnxruntime", "executorch"}),
        ("vision=coreml,text=executorch", {"target": "ios"}, {"coreml", "executorch"}),
        ("vision=executorch,text=coreml", {"target": "ios", "precision": "fp16"}, {"coreml", "executorch"}),
    ],
)
def test_every_pair_passes(
    backend: str, words: dict[str, str], engines: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = exported(tmp_path, backend, monkeypatch, **words)
    assert {step.status for step in made.verdict.steps} == {"passed"}, made.verdict.steps
    assert {graph.engine for graph in made.bundle.manifest.graphs} == engines
    # What is emulated or evaluated is not timed; the other part is, graph by graph, and never whole answers.
    real = {placed.graph for placed in made.verdict.placements if placed.executed}
    emulated = {graph.graph for graph in made.verdict.graphs if "emulated" in graph.engine}
    steps_of_real = {
        step_label(graph.name, step)
        for graph in made.bundle.manifest.graphs
        for step in steps(graph, OWN_LAYOUT)
        if graph.name in real
    }
    assert {timed.graph for timed in made.verdict.latency} == steps_of_real - emulated
    assert made.verdict.answers is None
