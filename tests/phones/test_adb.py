"""Real adb, a real adbd, and the native runner on emulated arm64: a whole bundle, and everything that goes wrong."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from runtime.bundle import MANIFEST, Bundle, read_bundle
from runtime.check.judge import check
from runtime.devices.adb import AdbDevice, Shell, chosen, listed
from runtime.devices.findings import Job, Timing
from runtime.devices.received import findings_of
from runtime.devices.wire import FINDINGS, OUTPUTS, FindingsFile, make_job, read_findings
from runtime.errors import DeviceError, FindingsError, OutputError
from tests.conftest import CommandLine
from tests.phones.machines import EmulatedDevice, emulated_device, native_runner
from tests.sample_bundle import Sample, make_bundle

pytestmark = pytest.mark.slow

Made = Callable[..., AdbDevice]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmulatedDevice]:
    with emulated_device(tmp_path_factory.mktemp("device")) as device:
        yield device


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One small graph: what is pushed and pulled matters here."""
    return read_bundle(make_bundle(tmp_path_factory.mktemp("sample") / "bundle", Sample(engine="executorch")))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def device(emulated: EmulatedDevice, said: list[str]) -> Iterator[AdbDevice]:
    yield made(emulated, said)
    emulated.plug_in()
    emulated.shell(f"rm -rf {emulated.folder}; rm -f {emulated.path}/*")


def made(emulated: EmulatedDevice, said: list[str], *, timeout_s: float = 300, runner: Path | None = None) -> AdbDevice:
    return AdbDevice(
        emulated.serial,
        runner=runner or native_runner("aarch64"),
        folder=emulated.folder,
        timeout_s=timeout_s,
        progress=said.append,
        adb=str(emulated.adb),
    )


# The whole way


def test_a_whole_bundle_answers_on_arm(
    xnnpack_bundle: Path, emulated: EmulatedDevice, said: list[str], tmp_path: Path, command_line: CommandLine
) -> None:
    """Photo in, answer out, findings back; float32 sums in NEON's order, and float16 products in 16 bits."""
    whole = read_bundle(xnnpack_bundle)
    arm = made(emulated, said)
    job, tensors = make_job(whole, threads=2)
    received = arm.collect(whole, job, tensors, tmp_path / "findings")
    assert received.file.device.kind == "emulated"
    assert received.file.device.abi == "aarch64"
    assert received.file.accumulator_bits == 16
    assert received.file.answer is not None
    assert (received.file.answer.image_tokens_before, received.file.answer.image_tokens_after) == (576, 64)
    assert len(received.file.load.first_ms) == len(received.file.load.later_ms) == 1
    verdict = check(whole, findings_of(whole, received))
    assert verdict.outcome == "passed", verdict.failed_steps + verdict.unchecked_steps
    assert verdict.answer is not None
    assert verdict.answer.same == len(received.file.answer.ids)
    # Nothing of an imitated processor's speed is told.
    assert verdict.latency == ()
    assert verdict.answers is None
    env = {"PATH": f"{emulated.adb.parent}:{os.environ['PATH']}"}
    where = ("--serial", emulated.serial, "--folder", emulated.folder, "--runner", native_runner("aarch64"))
    photo = tmp_path / "photo.png"
    from PIL import Image

    Image.fromarray(whole.golden()["photo"]).save(photo)
    there = command_line(
        "device", "ask", xnnpack_bundle, photo, "What is it?", "--max-new-tokens", "8", *where, env=env
    )
    here = command_line("ask", xnnpack_bundle, photo, "What is it?", "--max-new-tokens", "8", "-q")
    assert there.returncode == here.returncode == 0, there.stderr + here.stderr
    assert there.stdout.strip() == here.stdout.strip()
    assert "emulated: says nothing about a phone" in there.stderr


def test_what_is_there_is_not_pushed_again(device: AdbDevice, bundle: Bundle, said: list[str], tmp_path: Path) -> None:
    for number in range(2):
        job, tensors = make_job(bundle)
        device.collect(bundle, job, tensors, tmp_path / str(number))
    pushes = [line for line in said if line.startswith("pushing ")]
    assert not pushes[0].startswith("pushing 3 files")
    # The job alone is new, and its tensors are what they were, in a folder of their own.
    assert pushes[1].startswith("pushing 3 files")
    assert device.shell.do(f"ls {device._folder}/jobs").strip() == ""


def test_the_command_writes_findings_and_a_report(
    device: AdbDevice, bundle: Bundle, emulated: EmulatedDevice, tmp_path: Path, command_line: CommandLine
) -> None:
    env = {"PATH": f"{emulated.adb.parent}:{os.environ['PATH']}"}
    where = ("--serial", emulated.serial, "--folder", emulated.folder, "--runner", native_runner("aarch64"))
    out = tmp_path / "found"
    done = command_line("device", "bench", bundle.path, *where, "--runs", "2", "--output-dir", out, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    again = command_line("device", "bench", bundle.path, *where, "--output-dir", out, env=env)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    page = command_line("report", out, "--reference", bundle.path, "--output-dir", tmp_path / "report")
    assert page.returncode == 0, page.stdout + page.stderr
    html = (tmp_path / "report" / "devices.html").read_text()
    assert "Emulated: another processor imitates the device" in html
    assert "Phones" not in html
    table = command_line("device", "list", env=env)
    assert emulated.serial in table.stdout
    cleaned = command_line("device", "clean", *where[:4], env=env)
    assert cleaned.returncode == 0
    assert emulated.shell(f"ls {emulated.folder} 2>&1 || true").strip().endswith("No such file or directory")


# Which device


def test_two_devices_and_none(emulated: EmulatedDevice) -> None:
    adb = str(emulated.adb)
    devices = listed(adb)
    assert {device.serial for device in devices} >= {emulated.serial}
    if len(devices) > 1:  # adb finds the same device by itself, too
        with pytest.raises(DeviceError, match=r"devices are connected: .*; choose one with --serial"):
            chosen(None, adb)
    with pytest.raises(DeviceError, match=r"there is no device 'R58X'; adb lists: .*localhost:5555"):
        chosen("R58X", adb)


# The cable


def test_a_cable_pulled_in_a_push_goes_on_where_it_stood(
    emulated: EmulatedDevice, device: AdbDevice, said: list[str], tmp_path: Path
) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(np.random.default_rng(0).bytes(60 * 2**20))
    to = f"{emulated.folder}/large.bin"
    import hashlib

    sha256 = hashlib.sha256(large.read_bytes()).hexdigest()
    sent = 0

    def tell(count: int) -> None:
        nonlocal sent
        sent += count
        if sent > 24 * 2**20 and "cut" not in said:
            said.append("cut")
            emulated.unplug()

    with pytest.raises(DeviceError, match="plug it in"):
        device._send(large, to, sha256, tell)
    emulated.plug_in()
    time.sleep(0.5)
    there = int(device.shell.do(f"stat -c %s {to}.part"))
    assert 0 < there < 60 * 2**20
    before = sent
    device._send(large, to, sha256, tell)
    assert sent - before == 60 * 2**20 - there
    assert any("going on behind them" in line for line in said)
    assert device.shell.do(f"sha256sum {to}").split()[0] == sha256


def test_a_half_file_of_something_else_is_not_gone_on_with(device: AdbDevice, tmp_path: Path) -> None:
    small = tmp_path / "small.bin"
    small.write_bytes(b"right" * 1000)
    to = f"{device._folder}/small.bin"
    device.shell.do(f"mkdir -p {device._folder}; echo wrong > {to}.part")
    import hashlib

    device._send(small, to, hashlib.sha256(small.read_bytes()).hexdigest(), lambda count: None)
    assert device.shell.do(f"stat -c %s {to}").strip() == "5000"


def test_a_cable_pulled_while_it_runs(
    emulated: EmulatedDevice, device: AdbDevice, bundle: Bundle, said: list[str], tmp_path: Path
) -> None:
    """The job goes on; the desktop waits until the device is back."""
    job, tensors = make_job(bundle, timing=None)

    def pull_and_plug() -> None:
        while not any("running" in line or "opening" in line for line in said):
            time.sleep(0.05)
        emulated.unplug()
        while not any("connection was lost" in line for line in said):
            time.sleep(0.05)
        emulated.plug_in()

    slow = _runner_that(tmp_path, "echo opening the graphs; sleep 3")
    other = made(emulated, said, runner=slow)
    hand = threading.Thread(target=pull_and_plug)
    hand.start()
    received = other.collect(bundle, job, tensors, tmp_path / "findings")
    hand.join()
    assert "the device is back" in said
    assert check(bundle, findings_of(bundle, received)).outcome == "passed"


def _runner_that(folder: Path, script: str, *, then_run: bool = True) -> Path:
    """A runner that does something first. It is no ELF file, which is what the product looks at: so its head is one."""
    real = native_runner("aarch64")
    place = folder / "runner"
    place.mkdir()
    for library in real.parent.glob("*.so"):
        (place / library.name).symlink_to(library)
    (place / "real.so").symlink_to(real)
    wrapper = place / "pruneport_runner"
    tail = 'chmod 755 "$(dirname "$0")/real.so"; exec "$(dirname "$0")/real.so" "$@"' if then_run else ""
    wrapper.write_text(f"#!/bin/sh\n{script}\n{tail}\n")
    return wrapper


@pytest.fixture(autouse=True)
def scripts_may_run(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Lets a shell script stand in for the runner, except where the check of its kind is what is tested."""
    if "abi" not in request.node.name:
        monkeypatch.setattr(AdbDevice, "_check_runner", lambda self: None)


def test_a_cable_pulled_while_it_runs_for_good(
    emulated: EmulatedDevice, device: AdbDevice, bundle: Bundle, said: list[str], tmp_path: Path
) -> None:
    """The findings wait on the device, and `pull` fetches them."""
    job, tensors = make_job(bundle)
    slow = _runner_that(tmp_path, "echo opening the graphs; sleep 2")
    other = made(emulated, said, runner=slow, timeout_s=6)

    def pull() -> None:
        while not any("opening" in line for line in said):
            time.sleep(0.05)
        emulated.unplug()

    hand = threading.Thread(target=pull)
    hand.start()
    with pytest.raises(DeviceError, match="pruneport device pull"):
        other.collect(bundle, job, tensors, tmp_path / "findings")
    hand.join()
    assert not (tmp_path / "findings").exists()
    emulated.plug_in()
    time.sleep(4)
    device.pull(tmp_path / "findings")
    assert read_findings(tmp_path / "findings").file.job == job.id


def test_findings_that_arrive_damaged_leave_nothing(
    emulated: EmulatedDevice, device: AdbDevice, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the cable is pulled in the middle of the pull."""
    from runtime.bundle import sha256_of as right

    monkeypatch.setattr(
        "runtime.devices.adb.sha256_of",
        lambda path, length=None: "0" * 64 if path.name == OUTPUTS else right(path, length),
    )
    job, tensors = make_job(bundle)
    with pytest.raises(DeviceError, match=r"arrived damaged.*pruneport device pull"):
        device.collect(bundle, job, tensors, tmp_path / "findings")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    device.pull(tmp_path / "findings")
    assert read_findings(tmp_path / "findings").file.bundle == bundle.identity


# The device


def test_a_full_device_is_noticed_before_anything_is_pushed(tmp_path: Path, bundle: Bundle, said: list[str]) -> None:
    with emulated_device(tmp_path / "small", size_mb=70) as small:
        full = made(small, said)
        with pytest.raises(DeviceError, match=r"has \d+ MB free in .*, \d+ MB are needed; delete something"):
            full.run(bundle, Job())
        assert small.shell(f"ls {small.folder} 2>&1 || true").strip().endswith("No such file or directory")


def _deaf(shell: Shell) -> Callable[[bytes, bytes], tuple[int, str]]:
    """Reads what a script said, but for the first time, when all of it is lost."""
    hear, lost = shell._ended, iter([True])

    def ended(output: bytes, errors: bytes) -> tuple[int, str]:
        silent = b"o space left" in output and next(lost, False)
        return hear(b"" if silent else output, b"" if silent else errors)

    return ended


def test_a_device_that_fills_up_meanwhile(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with emulated_device(tmp_path / "small", size_mb=70) as small:
        full = made(small, said)
        large = tmp_path / "large.bin"
        large.write_bytes(bytes(90 * 2**20))
        with pytest.raises(DeviceError, match="no space is left on it; delete something"):
            full._send(large, f"{small.folder}/large.bin", "0" * 64, lambda count: None)
        # adb may end before it has read the device's last words: then the device is asked how full it is.
        monkeypatch.setattr(full.shell, "_ended", _deaf(full.shell))
        with pytest.raises(DeviceError, match="no space is left on it; delete something"):
            full._send(large, f"{small.folder}/large.bin", "0" * 64, lambda count: None)


def test_wrong_abi(
    emulated: EmulatedDevice, device: AdbDevice, bundle: Bundle, said: list[str], tmp_path: Path
) -> None:
    from runtime.devices.adb import About

    wrong = made(emulated, said, runner=native_runner("x86_64"))
    wrong._about = About("R58X", "Acme Phone", "Android 16", "arm64-v8a", 10**12, 8 * 2**30)
    with pytest.raises(DeviceError, match="is built for x86_64, Acme Phone runs arm64-v8a; build it for that ABI"):
        wrong.run(bundle, Job())
    text = tmp_path / "runner.txt"
    text.write_text("no program")
    with pytest.raises(DeviceError, match="is no program of Android or Linux"):
        made(emulated, said, runner=text).run(bundle, Job())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", r"the system killed the runner \(signal 9\), most likely for want of memory: .* GiB"),
        ("kill -11 $$", r"the runner crashed \(signal 11\)"),
        ("echo 'out of luck' >&2; exit 5", "the runner ended with exit code 5: out of luck"),
        ("exec ./nowhere", "cannot run the runner"),
        ("kill -9 $PPID; sleep 30", "the runner is gone and left no word"),
    ],
)
def test_a_runner_that_dies_says_why_and_leaves_nothing(
    emulated: EmulatedDevice,
    device: AdbDevice,
    bundle: Bundle,
    said: list[str],
    tmp_path: Path,
    script: str,
    message: str,
) -> None:
    dying = made(emulated, said, runner=_runner_that(tmp_path, script, then_run=False))
    job, tensors = make_job(bundle)
    with pytest.raises(DeviceError, match=message):
        dying.collect(bundle, job, tensors, tmp_path / "findings")
    assert not (tmp_path / "findings").exists()
    assert device.shell.do(f"ls {emulated.folder}/jobs").strip() == ""


def test_a_job_that_takes_too_long_is_ended(
    emulated: EmulatedDevice, device: AdbDevice, bundle: Bundle, said: list[str], tmp_path: Path
) -> None:
    endless = made(emulated, said, runner=_runner_that(tmp_path, "sleep 987", then_run=False), timeout_s=3)
    job, tensors = make_job(bundle)
    with pytest.raises(DeviceError, match="did not end in 3 s and was stopped; allow more with --timeout"):
        endless.collect(bundle, job, tensors, tmp_path / "findings")
    assert "sleep 987" not in device.shell.do("ps -eo args | grep -v grep")
    assert device.shell.do(f"ls {emulated.folder}/jobs").strip() == ""


def test_ctrl_c_ends_the_job_on_the_device(
    emulated: EmulatedDevice,
    device: AdbDevice,
    bundle: Bundle,
    said: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    endless = made(emulated, said, runner=_runner_that(tmp_path, "echo opening; sleep 986", then_run=False))
    look = AdbDevice._look

    def interrupted(self: AdbDevice, place: str, seen: int) -> tuple[str, int]:
        if any("opening" in line for line in said):
            raise KeyboardInterrupt
        return look(self, place, seen)

    monkeypatch.setattr(AdbDevice, "_look", interrupted)
    job, tensors = make_job(bundle)
    with pytest.raises(KeyboardInterrupt):
        endless.collect(bundle, job, tensors, tmp_path / "findings")
    assert "sleep 986" not in device.shell.do("ps -eo args | grep -v grep")
    assert device.shell.do(f"ls {emulated.folder}/jobs").strip() == ""


def test_findings_of_another_bundle_are_refused(device: AdbDevice, bundle: Bundle, tmp_path: Path) -> None:
    job, tensors = make_job(bundle)
    received = device.collect(bundle, job, tensors, tmp_path / "findings")
    other = read_bundle(make_bundle(tmp_path / "other", Sample(engine="executorch", seed=1)))
    with pytest.raises(FindingsError, match="give the bundle that the device ran"):
        findings_of(other, received)


def test_findings_never_overwrite(device: AdbDevice, bundle: Bundle, tmp_path: Path) -> None:
    job, tensors = make_job(bundle)
    with pytest.raises(OutputError, match="exists already"):
        device.collect(bundle, job, tensors, tmp_path)


def test_a_job_with_a_gate_tells_of_it(device: AdbDevice, bundle: Bundle) -> None:
    findings = device.run(bundle, Job(threads=1, timing=Timing(warmup=0, runs=2)))
    assert all(found.latency is None for found in findings.graphs)
    assert check(bundle, findings).outcome == "passed"


# The app


APP_SCRIPTS = {
    "pm": 'echo "package:/data/app/base.apk"',
    "pidof": '[ -e "$STATE/alive" ]',
    "run-as": 'shift; cd "$STATE"; exec "$@"',
}


def _app(emulated: EmulatedDevice, tmp_path: Path, start: str, exit_info: str = "") -> Path:
    """Android's commands that an app is run by, as scripts on the device."""
    state = tmp_path / "state"
    (state / "files" / "jobs").mkdir(parents=True)
    scripts = {**APP_SCRIPTS, "am": start, "dumpsys": f"echo '{exit_info}'"}
    for name, script in scripts.items():
        path = emulated.path / name
        path.write_text(f"#!/bin/sh\nSTATE={state}\n{script}\n")
        path.chmod(0o755)
    return state


def test_the_app_runs_a_job(emulated: EmulatedDevice, bundle: Bundle, said: list[str], tmp_path: Path) -> None:
    """Its runner is the native one here: what is tested is how it is started, waited for and pulled from."""
    runner = native_runner("x86_64")
    start = (
        'case "$1" in force-stop) exit 0;; esac\n'
        # An app may not follow the link in the folder of its job: --es bundle DIR
        f'[ "$7" = bundle ] && [ ! -L "$8" ] && [ -f "$8/{MANIFEST}" ] || exit 1\n'
        "job=$(eval echo \\${$#})\n"  # the last word: --es job DIR
        'id=$(basename "$job")\ntouch "$STATE/alive"\n'
        f'LD_LIBRARY_PATH={runner.parent} {runner} "$job" "$STATE/out" --kind emulated > /dev/null 2>&1\n'
        'mv "$STATE/out" "$STATE/files/jobs/$id"\nrm -f "$STATE/alive"'
    )
    state = _app(emulated, tmp_path, start)
    app = AdbDevice(emulated.serial, folder=emulated.folder, timeout_s=120, progress=said.append, adb=str(emulated.adb))
    job, tensors = make_job(bundle)
    received = app.collect(bundle, job, tensors, tmp_path / "findings")
    assert check(bundle, findings_of(bundle, received)).outcome == "passed"
    assert list((state / "files" / "jobs").iterdir()) == []


@pytest.mark.parametrize(
    ("exit_info", "message"),
    [
        ("reason=6 (ANR) status=0", "it did not respond in time"),
        ("reason=4 (CRASH) status=0", "it crashed; see `adb logcat`"),
        ("reason=3 (LOW_MEMORY) status=0", "the system killed it for want of memory"),
        ("reason=10 (USER REQUESTED)", "user requested"),
        ("", "the system does not say why"),
    ],
)
def test_an_app_that_ends_says_why(
    emulated: EmulatedDevice, bundle: Bundle, said: list[str], tmp_path: Path, exit_info: str, message: str
) -> None:
    _app(emulated, tmp_path, "true", exit_info)
    app = AdbDevice(emulated.serial, folder=emulated.folder, timeout_s=60, progress=said.append, adb=str(emulated.adb))
    job, tensors = make_job(bundle)
    with pytest.raises(DeviceError, match=f"the app ended without findings: .*{message}"):
        app.collect(bundle, job, tensors, tmp_path / "findings")


def test_schema_of_what_came_back(device: AdbDevice, bundle: Bundle, tmp_path: Path) -> None:
    """C++ writes what msgspec reads strictly, and nothing more."""
    job, tensors = make_job(bundle)
    device.collect(bundle, job, tensors, tmp_path / "findings")
    raw = (tmp_path / "findings" / FINDINGS).read_bytes()
    assert msgspec.json.decode(raw, type=FindingsFile).bundle == bundle.identity
