"""ios/BenchCore in Debian's Swift: its own tests, its layout, and jobs whose findings the desktop reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from runtime.devices.received import findings_of
from runtime.devices.wire import FindingsFile, GateJob, TimingJob, make_job, read_findings, write_job
from runtime.image import preprocess
from tests.conftest import ROOT
from tests.ios.fake_bundle import KINDS, NEW_TOKENS, QUESTION, make_fake_bundle
from tests.ios.odd_tokenizers import write_odd_tokenizers
from tests.ios.toolchain import BUILT, CHECKOUT, EXCHANGE, run

pytestmark = pytest.mark.slow

# In pixel values of the bundles of sums: 0.5 over their least spread, which is 0.5.
GREY_LEVEL = 1.001
PACKAGE = ("--package-path", f"{CHECKOUT}/ios/BenchCore", "--scratch-path", f"{BUILT}/BenchCore")


@pytest.fixture(scope="module")
def built() -> None:
    """The package and its tests, built."""
    done = run("swift", "build", "--build-tests", *PACKAGE)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "warning:" not in done.stdout, done.stdout[-4000:]


def test_the_core_keeps_to_the_vectors_and_refuses_what_is_broken(built: None) -> None:
    vectors = {"PRUNEPORT_VECTORS": f"{CHECKOUT}/tests/phones/vectors"}
    done = run("swift", "test", "--skip-build", *PACKAGE, env=vectors)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " with 1 test skipped and 0 failures" in done.stdout, done.stdout[-2000:]
    for name in ("testPhotosAreWhatPillowMakesOfThem", "testQuestionsBecomeIdsAndIdsText", "testSafetensors"):
        assert f"{name}' passed" in done.stdout


def test_tokenizers_of_every_kind_are_the_librarys(built: None, tmp_path: Path) -> None:
    assert write_odd_tokenizers(tmp_path, seed=11) == 22
    only = ("--filter", "VectorTests.testQuestionsBecomeIdsAndIdsText")
    done = run("swift", "test", "--skip-build", *only, *PACKAGE, exchange=tmp_path, env={"PRUNEPORT_VECTORS": EXCHANGE})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "Executed 1 test, with 0 failures" in done.stdout


def test_sources_are_laid_out_as_swift_format_does_it() -> None:
    files = [f"{CHECKOUT}/{path.relative_to(ROOT)}" for path in sorted((ROOT / "ios").rglob("*.swift"))]
    done = run("swift-format", "lint", "--strict", "--configuration", f"{CHECKOUT}/ios/.swift-format", *files)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_comes_back_as_findings(built: None, tmp_path: Path, kind: str) -> None:
    bundle = make_fake_bundle(tmp_path / "sums", kind)
    twin = make_fake_bundle(tmp_path / "twin-of-sums", kind, pruned=False)
    timing = TimingJob(warmup=1, runs=2, answers=3)
    job, tensors = make_job(bundle, threads=2, timing=timing, twin=twin, gate=GateJob())
    write_job(tmp_path / "exchange" / "job", job, tensors)
    shutil.copytree(bundle.path, tmp_path / "exchange" / "job" / "bundle")
    shutil.copytree(twin.path, tmp_path / "exchange" / "job" / "twin")
    done = run(
        "swift",
        "test",
        "--skip-build",
        "--filter",
        "JobTests.testRunsTheJobOfTheEnvironment",
        *PACKAGE,
        exchange=tmp_path / "exchange",
        env={"PRUNEPORT_JOB": f"{EXCHANGE}/job", "PRUNEPORT_OUT": f"{EXCHANGE}/out"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    received = read_findings(tmp_path / "exchange" / "out")
    file = received.file
    assert file.trouble is None
    assert file.job == job.id
    assert (file.bundle, file.twin) == (bundle.identity, twin.identity)
    assert file.threads == 2
    assert len(file.load.first_ms) == len(file.load.later_ms) == 1
    assert file.gate is not None
    assert file.gate.passed
    assert file.memory is not None
    assert file.memory.peak_rss_bytes > 0
    assert not file.photo_refused
    expected = preprocess(bundle.golden()["photo"], bundle.manifest.image)
    np.testing.assert_allclose(received.tensors["pixel_values"], expected, atol=GREY_LEVEL)

    golden = bundle.golden()
    assert {(step.graph, step.step) for step in file.steps} == {(step.graph, step.step) for step in job.steps}
    assert len(file.steps) >= (4 if kind == "open" else 5)
    for step in file.steps:
        assert step.trouble is None
        assert (len(step.load_ms), len(step.warmup_ms), len(step.run_ms)) == (1, 1, 2)
        for info in bundle.graph(step.graph).outputs:
            got = received.tensors[f"out/{step.graph}/{step.step}/{info.name}"]
            np.testing.assert_array_equal(got, golden[f"{step.step}.out.{info.name}"])
        for info in bundle.graph(step.graph).states:
            assert received.tensors[f"state/{step.graph}/{step.step}/{info.name}"].shape == info.shape

    _check_answer(file, golden["answer.ids"].tolist())
    assert file.conditions[0].at_ms <= file.conditions[-1].at_ms
    assert {condition.thermal for condition in file.conditions} == {"nominal"}
    if kind == "stateful":  # of others the desktop reads who runs what from the program, which sums have none of
        findings = findings_of(bundle, received, twin=twin)
        assert all(graph.trouble is None for graph in findings.graphs)
        assert all(graph.outputs is not None for graph in findings.graphs)

    entries = json.loads((tmp_path / "exchange" / "out" / "benchmark_results.json").read_text())
    assert {entry["benchmarkModel"]["quantization"] for entry in entries} == {"fp32 / int4"}
    assert {"model_load_time(ms)", "time_to_first_token(ms)", "token_per_sec"} <= {entry["metric"] for entry in entries}


def _check_answer(file: FindingsFile, ids: list[int]) -> None:
    """The greedy ids, and runs in turns whose order is swapped each time."""
    answer = file.answer
    assert answer is not None
    assert answer.trouble is None
    assert list(answer.ids) == ids
    assert answer.question_tokens == len(QUESTION)
    assert answer.cache_bytes
    assert [(run.twin, run.warmup) for run in answer.runs] == [
        (False, True),
        (True, True),
        (True, False),
        (False, False),
        (False, False),
        (True, False),
        (True, False),
        (False, False),
    ]
    for timed in answer.runs:
        assert len(timed.token_ms) == NEW_TOKENS - 1
        assert timed.ttft_photo_ms >= timed.image_ready_ms >= timed.vision_ms
