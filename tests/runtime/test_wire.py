"""job.json and findings.json: what is written is read back, and what a device sends is trusted in nothing."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from runtime.bundle import Bundle, read_bundle
from runtime.check.judge import check
from runtime.devices.desktop import Desktop
from runtime.devices.findings import Job
from runtime.devices.here import HereDevice
from runtime.devices.received import findings_of
from runtime.devices.wire import (
    FINDINGS,
    INPUTS,
    JOB,
    OUTPUTS,
    AnswerFound,
    Condition,
    DeviceInfo,
    FindingsFile,
    MemoryFound,
    Received,
    RunnerInfo,
    StepFound,
    TimingJob,
    TroubleFound,
    device_files,
    make_job,
    minibench,
    read_findings,
    read_job,
    schemas,
    write_findings,
    write_job,
)
from runtime.errors import BundleError, DeviceError, FindingsError, OutputError
from tests.conftest import ROOT
from tests.sample_bundle import Sample, make_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(make_bundle(tmp_path_factory.mktemp("wire") / "bundle", Sample()))


def found(bundle: Bundle, **changes: Any) -> FindingsFile:
    """Findings of a phone that ran every step."""
    job, _ = make_job(bundle)
    steps = tuple(StepFound(graph=step.graph, step=step.step, run_ms=(3.0, 1.0, 2.0)) for step in job.steps)
    fields: dict[str, Any] = {
        "job": job.id,
        "bundle": bundle.identity,
        "device": DeviceInfo(
            name="Acme One", kind="phone", os="Android 16", abi="aarch64", soc="AC 1", cores=8, ram_bytes=8 * 2**30
        ),
        "runner": RunnerInfo(name="runner", version="1", engine="onnxruntime", engine_version="1.2.3"),
        "threads": 4,
        "started_utc": "2026-01-31T12:00:00Z",
        "ended_utc": "2026-01-31T12:01:00Z",
        "conditions": (Condition(at_ms=0.0, celsius=30.0, battery=0.5),),
        "steps": steps,
        "memory": MemoryFound(peak_rss_bytes=10**8, after_close_bytes=10**7),
    }
    return FindingsFile(**(fields | changes))


def tensors(bundle: Bundle) -> dict[str, np.ndarray]:
    """What an honest device sends."""
    findings = Desktop().run(bundle, Job(threads=1))
    sent: dict[str, np.ndarray] = {}
    for graph in findings.graphs:
        for name, array in (graph.outputs or {}).items():
            sent[f"out/{graph.graph}/{graph.step}/{name}"] = array
    assert findings.pixel_values is not None
    sent["pixel_values"] = findings.pixel_values
    return sent


def outcome(bundle: Bundle, file: FindingsFile, sent: dict[str, np.ndarray]) -> dict[str, str]:
    """Status of each step of the judge that did not pass, with its detail."""
    verdict = check(bundle, findings_of(bundle, Received(file, sent)))
    return {step.name: f"{step.status}: {step.detail}" for step in verdict.steps if step.status != "passed"}


# Round trips


def test_the_schemas_in_the_docs_are_those_of_the_code() -> None:
    for name, schema in schemas().items():
        path = ROOT / "docs" / name.replace(".json", ".schema.json")
        assert json.loads(path.read_text()) == json.loads(msgspec.json.encode(schema)), f"write {path.name} again"


def test_a_job_is_read_back(bundle: Bundle, tmp_path: Path) -> None:
    job, made = make_job(bundle, threads=3, timing=TimingJob(runs=4))
    write_job(tmp_path, job, made)
    assert read_job(tmp_path) == job
    from safetensors.numpy import load_file

    assert load_file(tmp_path / INPUTS).keys() == made.keys()
    (step,) = job.steps
    assert f"in/{step.graph}/{step.step}/pixel_values" in made


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b"\xff", b'{"id": "x"}', b"[" * 100_000])
def test_a_broken_job_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / JOB).write_bytes(raw)
    with pytest.raises(BundleError, match="is no job"):
        read_job(tmp_path)


def test_findings_are_read_back_and_judged(bundle: Bundle, tmp_path: Path) -> None:
    write_findings(tmp_path, found(bundle), tensors(bundle))
    received = read_findings(tmp_path)
    assert received.file.bundle == bundle.identity
    verdict = check(bundle, findings_of(bundle, received))
    assert verdict.passed
    assert [timed.bundle.median_ms for timed in verdict.latency] == [2.0]
    assert verdict.device == "Acme One (phone, AC 1, Android 16, aarch64)"


def test_a_device_gets_no_golden_and_no_reports(bundle: Bundle) -> None:
    files = device_files(bundle)
    assert bundle.manifest.golden.file not in files
    assert "report.html" not in files
    assert set(files) >= {file for graph in bundle.manifest.graphs for file in graph.files}


# What a device leaves out, or gets wrong


def test_a_step_that_was_left_out_is_not_passed(bundle: Bundle) -> None:
    gaps = outcome(bundle, found(bundle, steps=()), tensors(bundle))
    assert gaps["parity of vision_encoder"].startswith("not checked: the device did not run it")


def test_a_job_that_failed_as_a_whole_fails(bundle: Bundle) -> None:
    file = found(bundle, steps=(), trouble=TroubleFound(message="the model could not be opened"))
    assert outcome(bundle, file, tensors(bundle))["parity of vision_encoder"] == "failed: the model could not be opened"


def test_outputs_that_were_not_sent_fail(bundle: Bundle) -> None:
    failed = outcome(bundle, found(bundle), {"pixel_values": tensors(bundle)["pixel_values"]})
    assert failed["parity of vision_encoder"].startswith("failed: the device sent nothing for hidden")
    sent = {name: array[..., :1] for name, array in tensors(bundle).items()}
    assert outcome(bundle, found(bundle), sent).keys() >= {"parity of vision_encoder", "preprocessing"}


def test_a_photo_that_was_not_preprocessed_fails(bundle: Bundle) -> None:
    sent = {name: array for name, array in tensors(bundle).items() if name != "pixel_values"}
    assert outcome(bundle, found(bundle), sent) == {
        "preprocessing": "failed: the device sent no pixel_values of the photo"
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_numbers_that_are_none_fail(bundle: Bundle, value: float) -> None:
    sent = tensors(bundle)
    for name in sent:
        if name.endswith("/hidden"):
            sent[name] = np.full_like(sent[name], value)
    assert outcome(bundle, found(bundle), sent)["parity of vision_encoder"].startswith("failed")


def test_emulated_times_are_not_told(bundle: Bundle) -> None:
    device = msgspec.structs.replace(found(bundle).device, kind="emulated")
    verdict = check(bundle, findings_of(bundle, Received(found(bundle, device=device), tensors(bundle))))
    assert verdict.passed
    assert verdict.latency == ()


def test_findings_of_another_bundle(bundle: Bundle) -> None:
    with pytest.raises(FindingsError, match=r"not of .*give the bundle that the device ran"):
        findings_of(bundle, Received(msgspec.structs.replace(found(bundle), bundle="other 0011223344556677"), {}))


def test_findings_with_another_twin(bundle: Bundle, tmp_path: Path) -> None:
    twin = read_bundle(make_bundle(tmp_path / "twin", Sample(keep=16)))
    with pytest.raises(FindingsError, match="compare with 'other 1'"):
        findings_of(bundle, Received(found(bundle, twin="other 1"), {}), twin=twin)


# Hostile files


def raw_findings(bundle: Bundle, change: Any) -> bytes:
    built = msgspec.to_builtins(found(bundle))
    change(built)
    return json.dumps(built).encode()


HOSTILE: dict[str, Callable[[Bundle], bytes]] = {
    "empty": lambda b: b"",
    "truncated": lambda b: msgspec.json.encode(found(b))[:-40],
    "not JSON": lambda b: b"\x00\x01\x02",
    "nested": lambda b: b'{"findings_version":1,"x":' + b"[" * 200_000,
    "a list": lambda b: b"[]",
    "NaN": lambda b: msgspec.json.encode(found(b)).replace(b"[3.0", b"[NaN"),
    "infinity": lambda b: msgspec.json.encode(found(b)).replace(b"[3.0", b"[1e999"),
    "negative time": lambda b: msgspec.json.encode(found(b)).replace(b"[3.0", b"[-3.0"),
    "unknown field": lambda b: raw_findings(b, lambda d: d.update(extra=1)),
    "missing field": lambda b: raw_findings(b, lambda d: d.pop("device")),
    "wrong kind": lambda b: raw_findings(b, lambda d: d["device"].update(kind="toaster")),
    "no threads": lambda b: raw_findings(b, lambda d: d.update(threads=0)),
    "a date in words": lambda b: raw_findings(b, lambda d: d.update(started_utc="yesterday")),
    "a long name": lambda b: raw_findings(b, lambda d: d["device"].update(name="x" * 100_000)),
    "a battery of 300 %": lambda b: raw_findings(b, lambda d: d["conditions"][0].update(battery=3.0)),
    "a job that is a path": lambda b: raw_findings(b, lambda d: d.update(job="../../../../etc/passwd")),
    "many conditions": lambda b: raw_findings(b, lambda d: d.update(conditions=[{"at_ms": 0}] * 100_001)),
    "lone surrogate": lambda b: msgspec.json.encode(found(b)).replace(b"Acme One", b"\\ud800"),
    "broken UTF-8": lambda b: msgspec.json.encode(found(b)).replace(b"Acme", b"\xff\xfe"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_findings_are_refused(bundle: Bundle, tmp_path: Path, name: str) -> None:
    (tmp_path / FINDINGS).write_bytes(HOSTILE[name](bundle))
    with pytest.raises(FindingsError, match=r"findings\.json .*(again|schema)"):
        read_findings(tmp_path)


def test_huge_findings_are_not_read(bundle: Bundle, tmp_path: Path) -> None:
    with (tmp_path / FINDINGS).open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(FindingsError, match="findings have at most"):
        read_findings(tmp_path)


def test_findings_of_a_newer_runner(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / FINDINGS).write_bytes(raw_findings(bundle, lambda d: d.update(findings_version=2, news=1)))
    with pytest.raises(
        FindingsError, match="findings_version 2, this pruneport reads 1; use the pruneport and the runner"
    ):
        read_findings(tmp_path)


def test_no_findings(tmp_path: Path) -> None:
    with pytest.raises(FindingsError, match=r"has no findings\.json"):
        read_findings(tmp_path)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(FindingsError, match="give the folder"):
        read_findings(file)


HEADER = {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 20) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", len(json.dumps(HEADER))) + json.dumps(HEADER).encode() + bytes(4),
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    ],
)
def test_damaged_tensors_are_refused(bundle: Bundle, tmp_path: Path, raw: bytes) -> None:
    write_findings(tmp_path, found(bundle), {})
    (tmp_path / OUTPUTS).write_bytes(raw)
    with pytest.raises(FindingsError, match="not a whole safetensors file"):
        read_findings(tmp_path)


def test_a_link_is_not_followed(bundle: Bundle, tmp_path: Path) -> None:
    write_findings(tmp_path, found(bundle), {})
    (tmp_path / OUTPUTS).unlink()
    (tmp_path / OUTPUTS).symlink_to("/etc/hostname")
    with pytest.raises(FindingsError, match="not a plain file"):
        read_findings(tmp_path)


def test_an_answer_that_was_not_given(bundle: Bundle) -> None:
    """A bundle without text graphs asks for none; what a device sends all the same is not looked at."""
    file = found(bundle, answer=AnswerFound(ids=(1, 2), trouble=TroubleFound(message="no")))
    assert outcome(bundle, file, tensors(bundle)) == {}


def test_the_shape_of_minibench(bundle: Bundle) -> None:
    """The fields of the field's own dashboards, and medians of what was measured."""
    rows = minibench(found(bundle), bundle)
    assert all(row.keys() == {"benchmarkModel", "metric", "actualValue", "targetValue", "deviceInfo"} for row in rows)
    values = {row["metric"]: row["actualValue"] for row in rows}
    assert values == {"vision_encoder@vision_encoder(ms)": 2.0, "peak_rss(bytes)": 1e8}
    assert rows[0]["benchmarkModel"] == {
        "name": bundle.manifest.model,
        "backend": bundle.manifest.target.backend,
        "quantization": bundle.manifest.target.precision,
    }


def test_this_machine_by_a_job(bundle: Bundle, tmp_path: Path) -> None:
    """Python's engines write what a phone writes; nothing of a run that failed is left."""
    device = HereDevice()
    job, made = make_job(bundle, timing=TimingJob(warmup=1, runs=3))
    received = device.collect(bundle, job, made, tmp_path / "findings")
    assert received.file.device.kind == "desktop"
    (step,) = received.file.steps
    assert (len(step.warmup_ms), len(step.run_ms)) == (1, 3)
    assert step.delegates is not None
    assert check(bundle, findings_of(bundle, received)).outcome == "passed"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["findings"]
    with pytest.raises(OutputError, match="exists already"):
        device.collect(bundle, job, made, tmp_path / "findings")
    runner = tmp_path / "runner"
    runner.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    for mode, message in ((0o755, "ended with exit code 3: out of luck"), (0o644, "cannot be started")):
        runner.chmod(mode)
        with pytest.raises(DeviceError, match=message):
            HereDevice(runner=runner).collect(bundle, job, made, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["findings", "runner"]
