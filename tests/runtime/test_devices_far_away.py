"""Apple's devicectl against a recorded `xcrun`, and Qualcomm's AI Hub up to the request."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime.bundle import Bundle, read_bundle
from runtime.check.judge import check
from runtime.devices.ai_hub import AiHubDevice
from runtime.devices.devicectl import DevicectlDevice
from runtime.devices.findings import Job, Timing
from runtime.devices.received import findings_of
from runtime.devices.wire import make_job
from runtime.errors import DeviceError, OutputError
from runtime.session import open_session
from tests.sample_bundle import Sample, make_bundle

# Answers as `xcrun devicectl --json-output` writes them, cut down to what is read.
ONE = {"identifier": "00008130-000A", "deviceProperties": {"name": "Ada's iPhone"}, "connectionProperties": {}}
GONE = {
    "identifier": "00008130-000B",
    "deviceProperties": {"name": "An old one"},
    "connectionProperties": {"tunnelState": "unavailable"},
}

# Keeps a log of its words, copies to and from a folder that stands for the app's, and has a program run the job.
XCRUN = """#!{python}
import json, os, pathlib, shutil, subprocess, sys
words, here = sys.argv[1:], pathlib.Path({place!r})
with (here / "log").open("a") as log:
    log.write(json.dumps(words) + "\\n")
assert words[0] == "devicectl"
flag = lambda name: words[words.index(name) + 1]
result, error, app = {{}}, None, here / "app"
if words[1:3] == ["list", "devices"]:
    result = {{"devices": json.loads((here / "devices").read_text())}}
elif words[1:4] == ["device", "copy", "to"]:
    shutil.copytree(flag("--source"), app / flag("--destination"))
elif words[1:4] == ["device", "process", "launch"]:
    env = json.loads(flag("--environment-variables"))
    runner = json.loads((here / "runner").read_text())
    code = subprocess.run([*runner, app / "Documents" / env["PRUNEPORT_JOB"]]).returncode
    error = {{"userInfo": {{"NSLocalizedDescription": {{"string": "The app crashed."}}}}}} if code else None
elif words[1:4] == ["device", "copy", "from"]:
    source = app / flag("--source")
    if source.exists():
        shutil.copyfile(source, flag("--destination"))
else:
    sys.exit("unknown: " + " ".join(words))
pathlib.Path(flag("--json-output")).write_text(json.dumps({{"result": result, "error": error}}))
sys.exit(1 if error else 0)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the recorded xcrun keeps its things."""
    place = tmp_path / "phone"
    (place / "app" / "Documents").mkdir(parents=True)
    (place / "devices").write_text(json.dumps([ONE, GONE]))
    program = place / "xcrun"
    program.write_text(XCRUN.format(python=sys.executable, place=str(place)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return place


def phone(place: Path, **settings: Any) -> DevicectlDevice:
    return DevicectlDevice(xcrun=str(place / "xcrun"), **settings)


def runner(place: Path, script: str) -> None:
    """The app's part, as Python over the job's folder `job`."""
    code = f"import pathlib, sys; job = pathlib.Path(sys.argv[1]); {script}"
    (place / "runner").write_text(json.dumps([sys.executable, "-c", code]))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(make_bundle(tmp_path_factory.mktemp("far") / "bundle", Sample()))


def log(place: Path) -> list[list[str]]:
    return [json.loads(line) for line in (place / "log").read_text().splitlines()]


@pytest.mark.slow
def test_devicectl_runs_a_job(place: Path, tmp_path: Path) -> None:
    """The app's part is the native runner's here; the words of devicectl are those that Xcode documents."""
    from tests.phones.machines import native_runner

    program = native_runner()
    bundle = read_bundle(make_bundle(tmp_path / "bundle", Sample(engine="executorch")))
    env = f"{{'LD_LIBRARY_PATH': {str(program.parent)!r}}}"
    out = "job.with_name(job.name + '-findings')"
    run = f"subprocess.run([{str(program)!r}, job, {out}], check=True, env={env})"
    runner(place, f"import subprocess; {run}")
    device = phone(place)
    assert device.name == "Ada's iPhone"
    job, tensors = make_job(bundle)
    received = device.collect(bundle, job, tensors, tmp_path / "findings")
    assert check(bundle, findings_of(bundle, received)).outcome == "passed"
    words = [" ".join(line[1:4]) for line in log(place)]
    assert words == [
        "list devices --json-output",
        "device copy to",
        "device process launch",
        "device copy from",
        "device copy from",
    ]
    launch = next(line for line in log(place) if "launch" in line)
    assert launch[-1] == "org.pruneport.Pruneport"
    assert launch[launch.index("--device") + 1] == ONE["identifier"]
    assert "--console" in launch
    pushed = next(line for line in log(place) if "to" in line[1:4])
    assert pushed[pushed.index("--domain-type") + 1] == "appDataContainer"


def test_devicectl_pushes_no_golden(place: Path, bundle: Bundle, tmp_path: Path) -> None:
    runner(
        place,
        "print(*sorted(str(p.relative_to(job)) for p in job.rglob('*')), file=open(job.parents[2] / 'seen', 'w'))",
    )
    job, tensors = make_job(bundle)
    with pytest.raises(DeviceError, match=r"left no outputs\.safetensors: the app ended before it was done"):
        phone(place).collect(bundle, job, tensors, tmp_path / "findings")
    seen = (place / "seen").read_text().split()
    assert {"job.json", "inputs.safetensors", "bundle/manifest.json"} <= set(seen)
    assert f"bundle/{bundle.manifest.golden.file}" not in seen
    assert not (tmp_path / "findings").exists()


def test_an_app_that_crashes_on_an_iphone(place: Path, bundle: Bundle, tmp_path: Path) -> None:
    runner(place, "sys.exit(1)")
    job, tensors = make_job(bundle)
    with pytest.raises(DeviceError, match=r"devicectl device process launch` failed: The app crashed\."):
        phone(place).collect(bundle, job, tensors, tmp_path / "findings")
    assert not (tmp_path / "findings").exists()


def test_a_job_on_an_iphone_ends_in_time(place: Path, bundle: Bundle, tmp_path: Path) -> None:
    runner(place, "import time; time.sleep(60)")
    job, tensors = make_job(bundle)
    with pytest.raises(DeviceError, match="did not end in 1 s; allow more with --timeout"):
        phone(place, timeout_s=1.0).collect(bundle, job, tensors, tmp_path / "findings")


@pytest.mark.parametrize(
    ("devices", "serial", "message"),
    [
        ([], None, "no iPhone is connected; pair one in Xcode"),
        ([GONE], None, "no iPhone is connected"),
        ([ONE, {**ONE, "identifier": "2"}], None, "2 devices are connected: .*; choose one with --serial"),
        ([ONE], "nobody", r"there is no device 'nobody'; devicectl lists: Ada's iPhone \(00008130-000A\)"),
    ],
)
def test_which_iphone(place: Path, devices: list[Any], serial: str | None, message: str) -> None:
    (place / "devices").write_text(json.dumps(devices))
    with pytest.raises(DeviceError, match=message):
        phone(place, serial=serial)


def test_an_iphone_by_its_name(place: Path) -> None:
    assert phone(place, serial="Ada's iPhone").name == "Ada's iPhone"


def test_no_mac(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="iPhones need a Mac with Xcode"):
        DevicectlDevice(xcrun=str(tmp_path / "xcrun"))


# The hub


class Hub:
    """The client of AI Hub: runs the graph here, and keeps what it was asked."""

    def __init__(self, bundle: Bundle, *, fails: bool = False) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._bundle, self._fails = bundle, fails

    def Device(self, name: str) -> str:  # the client's own name
        return f"device {name}"

    def upload_model(self, path: str) -> str:
        self.asked.append(("model", Path(path).name))
        return f"model {Path(path).name}"

    def submit_inference_job(self, *, model: str, device: str, inputs: dict[str, list[np.ndarray]], name: str) -> Any:
        self.asked.append(("inference", (model, device, sorted(inputs), name)))
        with open_session(self._bundle, "vision_encoder", threads=1) as session:
            given = session.run({key: arrays[0] for key, arrays in inputs.items()})
        return SimpleNamespace(
            job_id="j1",
            get_status=lambda: SimpleNamespace(message="out of memory"),
            download_output_data=lambda: None if self._fails else {key: [array] for key, array in given.items()},
        )

    def submit_profile_job(self, *, model: str, device: str, name: str) -> Any:
        self.asked.append(("profile", (model, device, name)))
        summary = {
            "first_load_time": 2_000_000,
            "warm_load_time": 300_000,
            "all_inference_times": [5000, 4000, 6000],
            "estimated_inference_peak_memory": 123_456,
        }
        return SimpleNamespace(download_profile=lambda: {"execution_summary": summary})


def test_the_hub_runs_and_profiles_graphs(bundle: Bundle) -> None:
    hub = Hub(bundle)
    device = AiHubDevice("Samsung Galaxy S24", hub=hub)
    findings = device.run(bundle, Job(threads=1, timing=Timing(runs=3)))
    assert [what for what, _ in hub.asked] == ["model", "inference", "profile"]
    (_, (model, where, inputs, _)) = hub.asked[1]
    assert (model, where, inputs) == ("model vision_encoder.onnx", "device Samsung Galaxy S24", ["pixel_values"])
    (graph,) = findings.graphs
    assert graph.latency is not None
    assert graph.latency.bundle.median_ms == 5.0
    verdict = check(bundle, findings)
    assert [step.name for step in verdict.steps if step.status != "passed"] == ["preprocessing"]


def test_a_job_of_the_hub_that_fails(bundle: Bundle) -> None:
    device = AiHubDevice("Samsung Galaxy S24", hub=Hub(bundle, fails=True))
    verdict = check(bundle, device.run(bundle, Job()))
    failed = {step.name: step.detail for step in verdict.failed_steps}
    assert failed["parity of vision_encoder"] == "the hub's job j1 gave nothing: out of memory"


def test_what_the_hub_cannot_take(tmp_path: Path) -> None:
    program = read_bundle(make_bundle(tmp_path / "bundle", Sample(engine="executorch")))
    hub = Hub(program)
    verdict = check(program, AiHubDevice("Samsung Galaxy S24", hub=hub).run(program, Job()))
    (step,) = [step for step in verdict.unchecked_steps if step.name == "parity of vision_encoder"]
    assert step.detail == "the hub takes ONNX models, vision_encoder is for executorch"
    assert hub.asked == []


def test_the_hub_without_its_client() -> None:
    with pytest.raises(DeviceError, match=r"pip install 'pruneport\[ai-hub\]'"):
        AiHubDevice("Samsung Galaxy S24")


def test_the_hub_overwrites_nothing(bundle: Bundle, tmp_path: Path) -> None:
    job, tensors = make_job(bundle)
    with pytest.raises(OutputError, match="exists already"):
        AiHubDevice("Samsung Galaxy S24", hub=Hub(bundle)).collect(bundle, job, tensors, tmp_path)
