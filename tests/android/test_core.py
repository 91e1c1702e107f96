"""android/core in a JVM: its own checks, and jobs whose findings the desktop reads.

Its graphs are sums: nothing computes them but a few lines here and in the tests of android/core, so that a walk over
them is a real walk, and what comes of it is known to the last digit.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from runtime.bundle import (
    Bundle,
    BundleWriter,
    FrameInfo,
    GoldenInfo,
    GraphInfo,
    ImageInfo,
    Manifest,
    PixelsInfo,
    PromptInfo,
    PruneInfo,
    TargetInfo,
    TensorInfo,
    TextInfo,
    WeightsInfo,
    read_bundle,
)
from runtime.devices.wire import TimingJob, make_job, make_question, read_findings, write_job
from runtime.generation import Answers
from runtime.golden import ANSWER, PHOTO, PIXELS, QUESTION, input_key, output_key
from runtime.image import preprocess
from runtime.text_graphs import VISION_ENCODER
from tests.conftest import ROOT
from tests.ios.odd_tokenizers import write_odd_tokenizers
from tests.phones.machines import CACHE, made_once, need, unpack_npm
from tests.phones.make_vectors import VECTORS, SumGraph, _open_graphs

pytestmark = pytest.mark.slow

COMPILER = "kotlin-compiler@2.4.20"
CORE = ROOT / "android" / "core"
BEFORE, IMAGE, KEEP, LAYERS, CUT, WIDTH, CHUNK, VOCABULARY = 3, 10, 4, 3, 1, 4, 8, 50
ROOM = {"open": 90, "static": 20}
QUESTION_IDS, NEW_TOKENS = tuple(range(1, 12)), 6


def _run(*words: str | Path, cwd: Path | None = None, check: bool = True) -> str:
    done = subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, check=False, timeout=800)
    if check:
        assert done.returncode == 0, f"{words[0]}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@cache
def kotlin() -> Path:
    """The folder of Kotlin's compiler, as npm has it."""
    need("java")
    name = COMPILER.replace("@", "-")
    with made_once(name) as folder:
        if folder is not None:
            unpack_npm(COMPILER, folder)
    return CACHE / name / "package"


@pytest.fixture(scope="module")
def core() -> tuple[str, ...]:
    """The words that start the compiled core with its tests; built once for the sources as they are."""
    sources = sorted(CORE.rglob("*.kt"))
    compiler = kotlin()
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + COMPILER.encode()).hexdigest()[:12]
    name = f"android-core-{digest}"
    with made_once(name) as folder:
        if folder is not None:
            # Java 8 is what every phone has that the app runs on.
            settings = ("-Werror", "-jvm-target", "1.8", "-Xjdk-release=8", "-no-reflect")
            _run(compiler / "bin" / "kotlinc-jvm", *settings, "-d", folder / "classes", *sources)
    path = f"{CACHE / name / 'classes'}:{compiler / 'lib' / 'kotlin-stdlib.jar'}"
    return ("java", "-Xmx512m", f"-Dpruneport.vectors={VECTORS}", "-cp", path, "io.pruneport.core.VectorsKt")


def test_the_core_keeps_to_the_vectors_and_refuses_what_is_broken(core: tuple[str, ...]) -> None:
    said = _run(*core, check=False)
    last = re.fullmatch(r"(\d+) passed, (\d+) failed", said.splitlines()[-1])
    assert last is not None, said[-4000:]
    assert int(last[2]) == 0, said[-4000:]
    assert int(last[1]) >= 190


def test_tokenizers_of_every_kind_are_the_librarys(core: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(VECTORS, tmp_path / "vectors")
    count = write_odd_tokenizers(tmp_path / "vectors", seed=11)
    words = [word.replace(str(VECTORS), str(tmp_path / "vectors")) for word in core]
    said = _run(*words, check=False)
    last = re.fullmatch(r"(\d+) passed, (\d+) failed", said.splitlines()[-1])
    assert last is not None, said[-4000:]
    assert int(last[2]) == 0, said[-4000:]
    assert int(last[1]) > 50 * count


def test_a_failing_check_is_an_exit_code(core: tuple[str, ...], tmp_path: Path) -> None:
    shutil.copytree(VECTORS, tmp_path / "vectors")
    walks = json.loads((VECTORS / "walks.json").read_text(encoding="utf-8"))
    walks[0]["answers"][0]["ids"][0] += 1
    (tmp_path / "vectors" / "walks.json").write_text(json.dumps(walks), encoding="utf-8")
    words = [word.replace(str(VECTORS), str(tmp_path / "vectors")) for word in core]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].endswith(" passed, 1 failed")
    assert "FAILED walk 0" in done.stdout


def _graphs(kind: str) -> tuple[GraphInfo, ...]:
    if kind == "open":
        return _open_graphs(cut=CUT)
    seen, kept, room = BEFORE + IMAGE, BEFORE + KEEP, ROOM[kind]

    def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorInfo:
        return TensorInfo(name=name, shape=shape, dtype=dtype)

    def pairs(layers: range, entries: int, prefix: str = "") -> list[TensorInfo]:
        return [tensor(f"{prefix}{half}_{i}", 1, 2, entries, 2) for i in layers for half in ("key", "value")]

    def graph(name: str, inputs: list[TensorInfo], outputs: list[TensorInfo]) -> GraphInfo:
        return GraphInfo(
            name=name,
            file=f"{name}.onnx",
            engine="onnxruntime",
            arithmetic=("fp32",),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
        )

    front, back = range(CUT), range(CUT, LAYERS)
    past = [*pairs(front, seen + room, "past_"), *pairs(back, kept + room, "past_")]
    handed = [tensor("hidden", 1, kept, WIDTH), tensor("positions", 1, kept, dtype="int64")]

    def decoder(name: str, count: int) -> GraphInfo:
        takes = [tensor("inputs_embeds", 1, count, WIDTH), tensor("positions", 1, count, dtype="int64"), *past]
        return graph(name, takes, [tensor("logits", 1, count, VOCABULARY), *pairs(range(LAYERS), count)])

    return (
        graph("vision_encoder", [tensor("pixel_values", 1, 3, 2, 2)], [*handed, *pairs(front, seen)]),
        graph("image_prefill", handed, pairs(back, kept)),
        graph("token_embedding", [tensor("ids", 1, CHUNK, dtype="int64")], [tensor("inputs_embeds", 1, CHUNK, WIDTH)]),
        decoder("text_prefill", CHUNK),
        decoder("text_decoder", 1),
    )


def _bundle(target: Path, kind: str, *, pruned: bool = True) -> Bundle:
    """A bundle with its golden; `pruned` False makes only its manifest say that it is a twin."""
    infos = _graphs(kind)
    running = {info.name: SumGraph(info, []) for info in infos}
    pixels = np.full((1, 3, 2, 2), 2, np.float32)
    answers = Answers(running, bundle=target.name, before=BEFORE, first_text=BEFORE + IMAGE)
    told = answers.answer(answers.see(pixels), QUESTION_IDS, max_new_tokens=NEW_TOKENS, past_end=True)
    golden: dict[str, np.ndarray] = {
        PHOTO: np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8),
        input_key(VISION_ENCODER, PIXELS): pixels,
        QUESTION: np.asarray(QUESTION_IDS, np.int64),
        ANSWER: np.asarray([token.id for token in told], np.int64),
        input_key("token_embedding", "ids"): np.arange(CHUNK, dtype=np.int64)[None],
    }
    # What each graph takes that only hands on what those before it gave.
    for name in ("vision_encoder", "token_embedding", "image_prefill"):
        if name not in running:
            continue
        taken = {}
        for info in running[name].graph.inputs:
            key = input_key(name, info.name)
            taken[info.name] = golden[key if key in golden else output_key(VISION_ENCODER, info.name)]
        golden |= {output_key(name, output): array for output, array in running[name].run(taken).items()}
    image = IMAGE if pruned else KEEP
    with BundleWriter(target) as writer:
        (writer.path / "golden.safetensors").write_bytes(save(golden))
        for file in {file for info in infos for file in info.files}:
            (writer.path / file).write_bytes(file.encode() + bytes([pruned]))
        writer.commit(
            Manifest(
                name=target.name,
                model="sums",
                family="llava",
                created_utc="2026-01-31T12:00:00Z",
                weights=WeightsInfo(source="checkpoint", id="sums", sha256=hashlib.sha256(b"sums").hexdigest()),
                target=TargetInfo(name="android", backend="xnnpack", precision="fp32", quant_text="int4"),
                prune=PruneInfo(
                    cut=CUT,
                    image_tokens=image,
                    keep=KEEP,
                    grid=(2, image // 2),
                    pruned=pruned,
                    method="sums" if pruned else None,
                    settings={},
                    arithmetic="float32",
                ),
                graphs=infos,
                image=ImageInfo(
                    size=(2, 2),
                    resize_shortest=2,
                    rescale=0.5,
                    mean=(1.0, 2.0, 3.0),
                    std=(1.0, 0.5, 2.0),
                    pixels=PixelsInfo(token=1, least=1, most=9),  # which the app has no use for, and reads over
                ),
                prompt=PromptInfo(prefix_ids=tuple(range(BEFORE))),
                frame=FrameInfo(before=BEFORE, image=image, first_text=BEFORE + IMAGE),
                golden=GoldenInfo(file="golden.safetensors", device="CPU (numpy)", torch="none", photo="noise"),
                tools={"numpy": np.__version__},
                text=TextInfo(tokens=ROOM[kind], chunk=CHUNK),
            )
        )
    return read_bundle(target)


@pytest.mark.parametrize("kind", ROOM)
def test_a_job_comes_back_as_findings(core: tuple[str, ...], tmp_path: Path, kind: str) -> None:
    bundle = _bundle(tmp_path / "sums", kind)
    twin = _bundle(tmp_path / "twin-of-sums", kind, pruned=False)
    job, tensors = make_job(bundle, threads=2, timing=TimingJob(warmup=1, runs=2, answers=3), twin=twin)
    folder = tmp_path / "job"
    write_job(folder, job, tensors)
    shutil.copytree(bundle.path, folder / job.folder)
    shutil.copytree(twin.path, folder / "twin")
    said = _run(*core, folder, tmp_path / "out")
    assert said.splitlines()[0] == "opening the graphs"

    received = read_findings(tmp_path / "out")
    file = received.file
    assert file.trouble is None
    assert (file.job, file.bundle, file.twin) == (job.id, bundle.identity, twin.identity)
    assert file.threads == 2
    assert file.runner.engine == bundle.manifest.graphs[0].engine
    assert len(file.load.first_ms) == len(file.load.later_ms) == 1
    assert file.memory is not None
    assert not file.photo_refused
    wanted = preprocess(bundle.golden()[PHOTO], bundle.manifest.image)
    np.testing.assert_allclose(received.tensors[PIXELS], wanted, atol=1.1)  # one grey level

    golden = bundle.golden()
    assert [(step.graph, step.step) for step in file.steps] == [(step.graph, step.step) for step in job.steps]
    # Of an open bundle these two have one step; of a static one image_prefill joins them.
    assert len(file.steps) >= (2 if kind == "open" else 3)
    for step in file.steps:
        assert step.trouble is None
        assert (len(step.load_ms), len(step.warmup_ms), len(step.run_ms)) == (1, 1, 2)
        for info in bundle.graph(step.graph).outputs:
            key = output_key(step.step, info.name)
            if key in golden:
                np.testing.assert_array_equal(
                    received.tensors[f"out/{step.graph}/{step.step}/{info.name}"], golden[key]
                )

    answer = file.answer
    assert answer is not None
    assert answer.trouble is None
    assert list(answer.ids) == golden[ANSWER].tolist()
    assert (answer.image_tokens_before, answer.image_tokens_after) == (IMAGE, KEEP)
    assert answer.question_tokens == len(QUESTION_IDS)
    assert answer.cache_bytes
    turns = [(run.twin, run.warmup) for run in answer.runs]
    assert turns[:2] == [(False, True), (True, True)]
    assert [is_twin for is_twin, _ in turns] == [False, True, True, False, False, True, True, False]
    for run in answer.runs:
        assert len(run.token_ms) == NEW_TOKENS - 1
        assert run.ttft_photo_ms >= run.image_ready_ms >= run.vision_ms
    assert [seen.at_ms for seen in file.conditions] == sorted(seen.at_ms for seen in file.conditions)

    entries = json.loads((tmp_path / "out" / "benchmark_results.json").read_text())
    assert {entry["benchmarkModel"]["quantization"] for entry in entries} == {"fp32 / int4"}
    metrics = {entry["metric"] for entry in entries}
    assert metrics >= {"inference_time(ms)", "model_load_time(ms)", "time_to_first_token(ms)", "token_per_sec"}


def test_a_question_comes_back_as_an_answer(core: tuple[str, ...], tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "sums", "open")
    photo = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    job, tensors = make_question(bundle, photo, (4, 5), new_tokens=9)
    write_job(tmp_path / "job", job, tensors)
    shutil.copytree(bundle.path, tmp_path / "job" / "bundle")
    _run(*core, tmp_path / "job", tmp_path / "out")
    found = read_findings(tmp_path / "out").file
    assert found.answer is not None
    running = {info.name: SumGraph(info, []) for info in bundle.manifest.graphs}
    answers = Answers(running, bundle="sums", before=BEFORE, first_text=BEFORE + IMAGE)
    told = answers.answer(
        answers.see(preprocess(photo, bundle.manifest.image)), (4, 5), max_new_tokens=9, past_end=True
    )
    assert list(found.answer.ids) == [token.id for token in told]
    assert [run.warmup for run in found.answer.runs] == [True]


def test_bundles_may_lie_elsewhere(core: tuple[str, ...], tmp_path: Path) -> None:
    """As on a phone, where the app follows no link that leads to them."""
    bundle, twin = _bundle(tmp_path / "sums", "open"), _bundle(tmp_path / "twin-of-sums", "open", pruned=False)
    job, tensors = make_job(bundle, timing=TimingJob(warmup=0, runs=1, answers=1), twin=twin)
    write_job(tmp_path / "job", job, tensors)
    _run(*core, tmp_path / "job", tmp_path / "out", bundle.path, twin.path)
    found = read_findings(tmp_path / "out").file
    assert found.trouble is None
    assert found.answer is not None
    assert found.answer.trouble is None
    assert [run.twin for run in found.answer.runs] == [False, True, True, False]


def test_a_bundle_that_changed_on_the_way_is_said(core: tuple[str, ...], tmp_path: Path) -> None:
    bundle = _bundle(tmp_path / "sums", "open")
    job, tensors = make_job(bundle)
    write_job(tmp_path / "job", job, tensors)
    shutil.copytree(bundle.path, tmp_path / "job" / "bundle")
    (tmp_path / "job" / "bundle" / "model.pte").write_bytes(b"short")
    _run(*core, tmp_path / "job", tmp_path / "out")
    found = read_findings(tmp_path / "out").file
    assert found.trouble is not None
    assert "model.pte has 5 bytes" in found.trouble.message
    assert not found.steps
