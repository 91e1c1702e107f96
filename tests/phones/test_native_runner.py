"""The native runner on this machine: the same job as anywhere, starts that keep packed weights, and hostile files."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from runtime.bundle import MANIFEST, Bundle, read_bundle
from runtime.check.judge import check
from runtime.devices.received import findings_of
from runtime.devices.wire import (
    BUNDLE_DIR,
    FINDINGS,
    INPUTS,
    JOB,
    TWIN_DIR,
    GateJob,
    Received,
    TimingJob,
    make_job,
    read_findings,
    write_job,
)
from runtime.image import preprocess
from tests.phones.machines import native_runner
from tests.phones.make_vectors import VECTORS
from tests.sample_bundle import Sample, make_bundle

pytestmark = pytest.mark.slow


def run(job: Path, out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    runner = native_runner()
    return subprocess.run(
        [str(runner), str(job), str(out), *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={"LD_LIBRARY_PATH": str(runner.parent)},
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(make_bundle(tmp_path_factory.mktemp("sample") / "bundle", Sample(engine="executorch")))


def job_of(bundle: Bundle, place: Path, **settings: object) -> Path:
    job, tensors = make_job(bundle, **settings)  # type: ignore[arg-type]
    write_job(place, job, tensors)
    (place / BUNDLE_DIR).symlink_to(bundle.path)
    return place


def ran(job: Path, out: Path, *words: str) -> Received:
    done = run(job, out, *words)
    assert done.returncode == 0, done.stderr
    return read_findings(out)


def test_a_whole_bundle_and_its_twin(xnnpack_bundle: Path, tmp_path: Path) -> None:
    """Timed in turns; the second process maps what the first one packed."""
    whole = read_bundle(xnnpack_bundle)
    twin = read_bundle(xnnpack_bundle.parent / xnnpack_bundle.name.replace("keep64", "keepall"))
    place = job_of(whole, tmp_path / "job", threads=2, timing=TimingJob(warmup=1, runs=3, answers=2), twin=twin)
    (place / TWIN_DIR).symlink_to(twin.path)
    received = ran(place, tmp_path / "out", "--packed", str(tmp_path / "packed"))
    file = received.file
    assert (len(file.load.first_ms), len(file.load.later_ms)) == (1, 1)
    packed = sorted(tmp_path.glob("packed*"))
    assert [path.name for path in packed] == ["packed-model.pte", "packed-twin-model.pte"]
    verdict = check(whole, findings_of(whole, received, twin=twin))
    assert verdict.outcome == "passed", verdict.failed_steps + verdict.unchecked_steps
    assert file.answer is not None
    assert [(run.twin, run.warmup) for run in file.answer.runs] == [
        (False, True),
        (True, True),
        (True, False),
        (False, False),
        (False, False),
        (True, False),
    ]
    for each in file.answer.runs:
        assert each.image_ready_ms >= each.vision_ms + each.image_prefill_ms - 1
        assert each.ttft_photo_ms >= each.image_ready_ms + each.ttft_question_ms
        assert len(each.token_ms) == 63
    assert all(len(step.run_ms) == 3 and len(step.warmup_ms) == 1 for step in file.steps)
    assert verdict.answers is not None
    assert verdict.answers.ratio is not None
    stamps = [path.stat().st_mtime_ns for path in packed]
    again = ran(place, tmp_path / "again", "--packed", str(tmp_path / "packed"))
    assert (len(again.file.load.first_ms), len(again.file.load.later_ms)) == (0, 1)
    assert again.file.answer is not None
    assert again.file.answer.ids == file.answer.ids
    assert [path.stat().st_size for path in packed] == [path.stat().st_size for path in packed]
    assert stamps


def test_packed_weights_of_something_else_are_not_trusted(bundle: Bundle, tmp_path: Path) -> None:
    """A file that is cut off, or no such file at all, is packed anew."""
    place = job_of(bundle, tmp_path / "job")
    file = bundle.manifest.graphs[0].file
    for number, content in enumerate((b"", b"nonsense" * 1000)):
        (tmp_path / f"packed{number}-{file}").write_bytes(content)
        received = ran(place, tmp_path / f"out{number}", "--packed", str(tmp_path / f"packed{number}"))
        assert check(bundle, findings_of(bundle, received)).outcome == "passed"


def test_every_photo_of_the_vectors(bundle: Bundle, tmp_path: Path) -> None:
    """Any size, any filter: within one grey level of Pillow, which resizes along the axis first that costs it less."""
    import base64

    for number, case in enumerate(json.loads((VECTORS / "photos.json").read_text())):
        place = job_of(bundle, tmp_path / f"job{number}")
        photo = np.frombuffer(base64.b64decode(case["photo"]), np.uint8).reshape(case["height"], case["width"], 3)
        (place / BUNDLE_DIR).unlink()
        (place / BUNDLE_DIR).mkdir()
        manifest = json.loads((bundle.path / MANIFEST).read_text())
        manifest["image"] = case["image"]
        (place / BUNDLE_DIR / MANIFEST).write_text(json.dumps(manifest))
        for name in {file for graph in bundle.manifest.graphs for file in graph.files}:
            (place / BUNDLE_DIR / name).symlink_to(bundle.path / name)
        job, tensors = make_job(bundle)
        write_job(place, msgspec.structs.replace(job, steps=()), {**tensors, "photo": photo})
        received = ran(place, tmp_path / f"out{number}")
        info = type(bundle.manifest.image)(**{**case["image"], "size": tuple(case["image"]["size"])})
        levels = (received.tensors["pixel_values"] - preprocess(photo, info)) * np.reshape(info.std, (3, 1, 1)) * 255
        assert np.abs(levels).max() <= 1.001


def test_tiles_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    place = job_of(bundle, tmp_path / "job")
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    manifest["image"]["tiles"] = {"resize": [336, 336], "grid": [1, 1]}
    (place / BUNDLE_DIR).unlink()
    (place / BUNDLE_DIR).mkdir()
    (place / BUNDLE_DIR / MANIFEST).write_text(json.dumps(manifest))
    received = ran(place, tmp_path / "out")
    assert received.file.trouble is not None
    assert "sees a photo in tiles, which this runner cannot cut" in received.file.trouble.message


def test_a_gate_waits_no_longer_than_it_says(bundle: Bundle, tmp_path: Path) -> None:
    gate = GateJob(most_celsius=0.1, wait_s=0.0)
    place = job_of(bundle, tmp_path / "job", timing=TimingJob(warmup=0, runs=2), gate=gate)
    received = ran(place, tmp_path / "out")
    assert received.file.gate is not None
    assert received.file.gate.passed in (None, False)  # a machine without a thermometer says None


# Hostile and broken files


def bad_offsets(content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for entry in header.values():
        entry["data_offsets"] = [2**60, 2**60 + 4]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def bad_shape(content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for name, entry in header.items():
        if name.endswith("pixel_values"):
            entry["shape"] = [1, 3, entry["shape"][2] * entry["shape"][3], 1]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (INPUTS, lambda raw: b"", "is no safetensors file"),
        (INPUTS, lambda raw: raw[:100], "is truncated"),
        (INPUTS, lambda raw: struct.pack("<Q", 2**63) + raw[8:], "is truncated"),
        (INPUTS, bad_offsets, "lies outside"),
        (INPUTS, lambda raw: struct.pack("<Q", 4) + b"[[[[", "has no header"),
        (f"{BUNDLE_DIR}/{MANIFEST}", lambda raw: raw[:-200], "does not follow the bundle's schema"),
        (f"{BUNDLE_DIR}/{MANIFEST}", lambda raw: b"[" * 100_000, "does not follow the bundle's schema"),
        (
            f"{BUNDLE_DIR}/{MANIFEST}",
            lambda raw: raw.replace(b'"schema_version": 2', b'"schema_version": 3'),
            "another version of the bundle's schema",
        ),
    ],
)
def test_broken_files_are_named_in_the_findings(
    bundle: Bundle, tmp_path: Path, file: str, change: Callable[[bytes], bytes], message: str
) -> None:
    place = job_of(bundle, tmp_path / "job")
    if file.startswith(BUNDLE_DIR):
        (place / BUNDLE_DIR).unlink()
        (place / BUNDLE_DIR).mkdir()
        for name in (MANIFEST, *(name for graph in bundle.manifest.graphs for name in graph.files)):
            (place / BUNDLE_DIR / name).write_bytes((bundle.path / name).read_bytes())
    (place / file).write_bytes(change((place / file).read_bytes()))
    received = ran(place, tmp_path / "out")
    assert received.file.trouble is not None
    assert message in received.file.trouble.message
    verdict = check(bundle, findings_of(bundle, received))
    assert not verdict.passed


def test_a_wrong_shape_fails_its_step_alone(bundle: Bundle, tmp_path: Path) -> None:
    place = job_of(bundle, tmp_path / "job")
    (place / INPUTS).write_bytes(bad_shape((place / INPUTS).read_bytes()))
    received = ran(place, tmp_path / "out")
    assert received.file.trouble is None
    (step,) = received.file.steps
    assert step.trouble is not None
    assert "vision_encoder takes pixel_values float32[1, 3, 28, 28], got float32[1, 3, 784, 1]" in step.trouble.message


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"job_version": 2}', b'{"job_version": 1}', b"[" * 100_000])
def test_a_broken_job_is_refused(bundle: Bundle, tmp_path: Path, raw: bytes) -> None:
    place = job_of(bundle, tmp_path / "job")
    (place / JOB).write_bytes(raw)
    done = run(place, tmp_path / "out")
    assert done.returncode == 2
    assert "pruneport_runner: " in done.stderr
    assert not (tmp_path / "out" / FINDINGS).exists()


def test_a_place_that_cannot_be_written(bundle: Bundle, tmp_path: Path) -> None:
    place = job_of(bundle, tmp_path / "job")
    (tmp_path / "out").write_text("a file")
    done = run(place, tmp_path / "out")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_usage(tmp_path: Path) -> None:
    for words in ((), (str(tmp_path),), (str(tmp_path), "b", "--what"), (str(tmp_path), "b", "--what", "c")):
        runner = native_runner()
        done = subprocess.run(
            [str(runner), *words],
            capture_output=True,
            text=True,
            check=False,
            env={"LD_LIBRARY_PATH": str(runner.parent)},
        )
        assert done.returncode == 2
        assert done.stderr.startswith("usage: pruneport_runner JOB OUT")
