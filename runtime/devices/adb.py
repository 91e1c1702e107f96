"""An Android device over adb: pushes a bundle once, runs jobs in the native runner or the app, pulls the findings."""

from __future__ import annotations

import re
import shlex
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from runtime.bundle import MANIFEST, Bundle, sha256_of
from runtime.devices.remote import RemoteDevice, arriving, check_before
from runtime.devices.wire import (
    BUNDLE_DIR,
    FINDINGS,
    INPUTS,
    JOB,
    OUTPUTS,
    TWIN_DIR,
    GateJob,
    JobFile,
    device_files,
    write_job,
)
from runtime.errors import DeviceError, OutputError

FOLDER = "/data/local/tmp/pruneport"
APP = "io.pruneport.app"
RUNNER = "pruneport_runner"

_PROBE = Path(__file__).parents[1] / "engines" / "accumulator.pte"
_CHUNK_BYTES = 4 * 2**20
_SPARE_BYTES = 64 * 2**20
_QUICK_S = 60.0
_POLL_S = 1.0
_NO_SPACE = "o space left"
_ROOM = "stat -c %s {0}\ndf -k {0} | tail -n 1 | awk '{{print $4}}'"
_LOOK_S = 15.0
# Machines by their number in the header of an executable, and the ABIs of Android that run them.
_ABIS = {62: ("x86_64",), 183: ("arm64-v8a", "aarch64"), 40: ("armeabi-v7a", "armv7l"), 3: ("x86", "i686")}
# Android's own words for why an app ended, as `dumpsys activity exit-info` prints them.
_EXIT_REASON = re.compile(r"reason=(\d+) \(([^)]*)\)")
_EXIT_WORDS = {3: "the system killed it for want of memory", 4: "it crashed", 5: "it crashed in native code"} | {
    6: "it did not respond in time (ANR)"
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Listed:
    """A device as adb lists it; `state` is `device` where it can be used."""

    serial: str
    state: str
    model: str


def listed(adb: str = "adb") -> tuple[Listed, ...]:
    """The devices that adb knows. Raises DeviceError without adb."""
    lines = _call([adb, "devices", "-l"], timeout_s=_QUICK_S).stdout.decode(errors="replace").splitlines()
    found = []
    for line in lines[1:]:
        serial, _, rest = line.partition(" ")
        rest = rest.strip()
        if not serial or line.startswith("*"):
            continue
        state = "no permissions" if rest.startswith("no permissions") else rest.split(" ")[0]
        model = re.search(r"\bmodel:(\S+)", rest)
        found.append(Listed(serial, state, model[1].replace("_", " ") if model else ""))
    return tuple(found)


def chosen(serial: str | None, adb: str = "adb") -> str:
    """The serial of the device to use: the one asked for, or the only one. Raises DeviceError, with the remedy."""
    devices = listed(adb)
    names = ", ".join(f"{device.serial} ({device.state})" for device in devices) or "none"
    if serial is None:
        ready = [device for device in devices if device.state == "device"]
        if len(ready) == 1:
            return ready[0].serial
        if len(ready) > 1:
            raise DeviceError(f"{len(ready)} devices are connected: {names}; choose one with --serial")
        if not devices:
            raise DeviceError(
                "no device is connected; plug one in with USB debugging on (Settings, Developer options), "
                "see `adb devices`"
            )
        serial = devices[0].serial
    device = next((device for device in devices if device.serial == serial), None)
    if device is None:
        raise DeviceError(f"there is no device {serial!r}; adb lists: {names}")
    remedies = {
        "unauthorized": "unlock it and allow USB debugging in the question that it shows",
        "offline": "unplug it and plug it in again, or run `adb reconnect`",
        "no permissions": "this user may not open it; see the udev rules for adb",
    }
    if device.state != "device":
        remedy = remedies.get(device.state, "wait until it has started")
        raise DeviceError(f"{serial} cannot be used, its state is {device.state!r}: {remedy}")
    return serial


class _Lost(DeviceError):
    """The connection went away."""


class _Silent(DeviceError):
    """adb itself does not answer."""


def _call(words: list[str], *, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(words, capture_output=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        raise DeviceError(f"{words[0]} is not installed; install Android's platform tools (Debian: adb)") from None
    except OSError as err:
        raise DeviceError(f"{words[0]} cannot be started: {err.strerror}") from err
    except subprocess.TimeoutExpired:
        what = " ".join(words[1:5])
        raise _Silent(f"`adb {what}` did not end in {timeout_s:.0f} s; reconnect the device") from None


class Shell:
    """The shell of one device."""

    def __init__(self, serial: str, adb: str) -> None:
        self.serial, self._adb = serial, adb

    def words(self, *more: str) -> list[str]:
        """A command of adb for this device."""
        return [self._adb, "-s", self.serial, *more]

    def ask(self, script: str, *, timeout_s: float = _QUICK_S) -> tuple[int, str]:
        """Exit code and output of a script. Raises DeviceError where the connection was lost."""
        # adb's own exit code cannot be told from the script's.
        words = self.words("shell", "-T", f"{{ {script}\n}} 2>&1; rc=$?; echo; echo rc=$rc")
        try:
            done = _call(words, timeout_s=timeout_s)
        except _Silent as err:
            raise _Lost(str(err)) from err
        return self._ended(done.stdout, done.stderr)

    def _ended(self, output: bytes, errors: bytes) -> tuple[int, str]:
        text = output.decode(errors="replace")
        mark = text.rfind("\nrc=")
        if mark < 0:
            reason = errors.decode(errors="replace").strip().splitlines()
            raise _Lost(
                f"the connection to {self.serial} was lost ({reason[-1] if reason else 'no answer'}); plug it in and "
                "run the same command again: what was pushed stays"
            )
        return int(text[mark + 4 :].split()[0]), text[:mark].replace("\r\n", "\n")

    def do(self, script: str, *, timeout_s: float = _QUICK_S) -> str:
        """Output of a script that must succeed. Raises DeviceError."""
        # Its first failure ends it.
        code, text = self.ask(f"( set -e\n{script}\n)", timeout_s=timeout_s)
        if code:
            raise DeviceError(f"{self.serial} refused `{script.splitlines()[0][:80]}`: {_full(text)}")
        return text

    def append(self, source: Path, start: int, remote: str, tell: Callable[[int], None]) -> None:
        """Appends a file from `start` on to one on the device. Raises DeviceError."""
        script = f"{{ cat >> {shlex.quote(remote)}; }} 2>&1; rc=$?; echo; echo rc=$rc"
        # To files, because nobody reads pipes while the file is written.
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors, source.open("rb") as file:
            process = subprocess.Popen(
                self.words("shell", "-T", script), stdin=subprocess.PIPE, stdout=out, stderr=errors
            )
            assert process.stdin is not None
            try:
                file.seek(start)
                while chunk := file.read(_CHUNK_BYTES):
                    process.stdin.write(chunk)
                    tell(len(chunk))
                process.stdin.close()
                process.wait(timeout=_QUICK_S)
            except (BrokenPipeError, ConnectionError):
                process.wait(timeout=_QUICK_S)
            except subprocess.TimeoutExpired:
                raise _Lost(f"{self.serial} took no more of {source.name}; plug it in again, and repeat") from None
            finally:
                process.kill()
                with suppress(OSError):
                    process.stdin.close()
            out.seek(0)
            errors.seek(0)
            try:
                code, text = self._ended(out.read(), errors.read())
            except _Lost:
                # adb may end before it has read why the device takes no more.
                there, free_kib = map(int, self.do(_ROOM.format(shlex.quote(remote))).split())
                if there + 1024 * free_kib >= source.stat().st_size:
                    raise
                code, text = 1, _NO_SPACE
            if code or _NO_SPACE in text:
                raise DeviceError(f"{source.name} cannot be written to {self.serial}: {_full(text)}")

    def read(self, remote: str, target: Path) -> None:
        """Copies a file from the device, as its hash there says. Raises DeviceError, OutputError."""
        wanted = self.do(f"sha256sum {shlex.quote(remote)}", timeout_s=600).split()[0]
        try:
            with target.open("wb") as file:
                done = subprocess.run(
                    self.words("exec-out", f"cat {shlex.quote(remote)}"),
                    stdout=file,
                    stderr=subprocess.PIPE,
                    stdin=subprocess.DEVNULL,
                    timeout=3600,
                    check=False,
                )
            found = sha256_of(target)
        except OSError as err:
            raise OutputError(f"{target} cannot be written: {err.strerror or err}") from err
        except subprocess.TimeoutExpired:
            raise _Lost(f"{self.serial} sent {remote} not whole in an hour; plug it in again, and pull again") from None
        if found != wanted:
            reason = done.stderr.decode(errors="replace").strip()
            raise _Lost(
                f"{Path(remote).name} arrived damaged from {self.serial}{f' ({reason})' if reason else ''}; plug it "
                "in again and run `pruneport device pull`: the findings are still there"
            )


def _full(text: str) -> str:
    if _NO_SPACE in text:
        return "no space is left on it; delete something, or run `pruneport device clean`"
    return text.strip().splitlines()[-1] if text.strip() else "it gave no reason"


@dataclass(frozen=True)
class About:
    """What a device tells of itself: Android's model, empty where it is none; ABI; bytes free where bundles go."""

    serial: str
    model: str
    system: str
    abi: str
    free_bytes: int
    ram_bytes: int

    @property
    def is_phone(self) -> bool:
        """False for anything that does not call itself an Android device."""
        return bool(self.model)


class AdbDevice(RemoteDevice):
    """An Android device, `serial` or the only one.

    `runner` is the native runner built for the device, with its libraries beside it; without one the app is used, which
    must be installed. A job that takes longer than `timeout_s` is ended. `gate` None times at any temperature.
    """

    def __init__(
        self,
        serial: str | None = None,
        *,
        runner: Path | None = None,
        folder: str = FOLDER,
        timeout_s: float = 3600.0,
        gate: GateJob | None = None,
        progress: Say | None = None,
        adb: str = "adb",
    ) -> None:
        self._say = progress or (lambda message: None)
        self.shell = Shell(chosen(serial, adb), adb)
        self._runner, self._folder = runner, folder
        self._timeout_s, self.gate = timeout_s, gate
        self._about: About | None = None
        # Where what a job runs lies on the device, by what links in its folder are called.
        self._bundles: dict[str, str] = {}

    @property
    def name(self) -> str:
        """The model, or the serial where it has none."""
        return self.about().model or self.shell.serial

    def about(self) -> About:
        """What the device tells of itself. Raises DeviceError."""
        if self._about is None:
            text = self.shell.do(
                f"d={shlex.quote(self._folder)}\n"
                'while [ ! -d "$d" ]; do d=$(dirname "$d"); done\n'
                "for p in ro.product.manufacturer ro.product.model ro.build.version.release ro.product.cpu.abi; do\n"
                'echo "$p=$(getprop $p 2>/dev/null)"\ndone || true\n'
                'echo "machine=$(uname -m)"\n'
                'echo "free=$(df -k "$d" | tail -n 1 | awk \'{print $4}\')"\n'
                'echo "ram=$(grep MemTotal /proc/meminfo | tr -dc 0-9)"'
            )
            told = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
            model = f"{told.get('ro.product.manufacturer', '')} {told.get('ro.product.model', '')}".strip()
            release = told.get("ro.build.version.release", "")
            self._about = About(
                serial=self.shell.serial,
                model=model,
                system=f"Android {release}" if release else "Linux",
                abi=told.get("ro.product.cpu.abi") or told.get("machine", ""),
                free_bytes=int(told.get("free") or 0) * 1024,
                ram_bytes=int(told.get("ram") or 0) * 1024,
            )
        return self._about

    def _find(
        self, bundle: Bundle, job: JobFile, tensors: dict[str, np.ndarray], twin: Bundle | None, out: Path
    ) -> None:
        """Pushes what is missing, runs the job, and pulls."""
        self._check_runner()
        if not self.about().is_phone:
            job = msgspec.structs.replace(job, gate=None)  # its thermometer, if any, is that of what imitates it
        place = f"{self._folder}/jobs/{job.id}"
        with tempfile.TemporaryDirectory() as folder:
            write_job(Path(folder), job, tensors)
            self._push(bundle, twin, Path(folder), place)
        try:
            self._run(job, place, bundle)
            self._fetch(job.id, out)
        except _Lost:
            raise  # it may still run: the findings wait there
        except BaseException:
            self._remove(place)
            raise
        self._remove(place)

    def pull(self, out_dir: Path, job: str | None = None) -> Path:
        """Copies the findings of a job, by default the last that ended, to `out_dir`. Raises DeviceError."""
        shell, jobs = self.shell, f"{self._folder}/jobs"
        if job is None:
            _, names = shell.ask(f"cd {shlex.quote(jobs)} && ls -t */out/{FINDINGS}")
            found = re.match(r"([0-9a-f]{16})/out/", names)
            if found is None:
                raise DeviceError(
                    f"{shell.serial} holds no findings in {jobs}; a job that still runs has none yet, and those that "
                    "were pulled are gone"
                )
            job = found[1]
        check_before(out_dir)
        with arriving(out_dir) as folder:
            self._fetch(job, folder)
        return out_dir

    def _fetch(self, job: str, out: Path) -> None:
        self._say("pulling the findings")
        for name in (OUTPUTS, FINDINGS):
            self.shell.read(f"{self._folder}/jobs/{job}/out/{name}", out / name)

    def clean(self) -> None:
        """Removes all that was ever pushed to the device."""
        self.shell.do(f"rm -rf {shlex.quote(self._folder)}", timeout_s=600)

    def _remove(self, place: str) -> None:
        try:
            self.shell.do(f"rm -rf {shlex.quote(place)}", timeout_s=_QUICK_S)
        except DeviceError as err:
            self._say(f"left on the device: {place} ({err})")

    def _check_runner(self) -> None:
        """Refuses a runner for another processor before anything is pushed."""
        if self._runner is None:
            code, _ = self.shell.ask(f"pm path {APP}")
            if code:
                raise DeviceError(
                    f"{self.shell.serial} does not have the app {APP}; install it, or give the native runner with "
                    "--runner, see android/README.md"
                )
            return
        try:
            with self._runner.open("rb") as file:
                head = file.read(20)
        except OSError as err:
            raise DeviceError(f"the runner {self._runner} cannot be read: {err.strerror}") from err
        if head[:4] != b"\x7fELF" or len(head) < 20:
            raise DeviceError(f"{self._runner} is no program of Android or Linux; build it, see android/README.md")
        machine = struct.unpack_from("<H", head, 18)[0]
        abi = self.about().abi
        built_for = _ABIS.get(machine, (f"machine {machine}",))
        if abi not in built_for and self.about().is_phone:
            raise DeviceError(
                f"{self._runner} is built for {built_for[0]}, {self.name} runs {abi}; build it for that ABI"
            )

    def _push(self, bundle: Bundle, twin: Bundle | None, folder: Path, place: str) -> None:
        files: list[tuple[Path, str, str]] = []  # from, to, sha256
        self._bundles = {}
        for name, each in ((BUNDLE_DIR, bundle), (TWIN_DIR, twin)):
            if each is None:
                continue
            # By content: another export of the same name lies elsewhere, and what an export shares is pushed once.
            where = f"{self._folder}/bundles/{each.manifest.name}-{each.key}"
            self._bundles[name] = where
            listed_files = {file: each.manifest.files[file].sha256 for file in device_files(each)}
            listed_files[MANIFEST] = sha256_of(each.path / MANIFEST)
            files += [
                (each.file(file) if file != MANIFEST else each.path / MANIFEST, f"{where}/{file}", sha256)
                for file, sha256 in listed_files.items()
            ]
        for name in (JOB, INPUTS):
            files.append((folder / name, f"{place}/{name}", sha256_of(folder / name)))
        files.append((_PROBE, f"{place}/{_PROBE.name}", sha256_of(_PROBE)))
        if self._runner is not None:
            beside = sorted(self._runner.parent.glob("*.so*"))
            files += [(file, f"{self._folder}/runner/{file.name}", sha256_of(file)) for file in (self._runner, *beside)]
        there = self._there([to for _, to, _ in files])
        missing = [(source, to, sha256) for source, to, sha256 in files if there.get(to) != sha256]
        needed = sum(source.stat().st_size for source, _, _ in missing)
        self._about = None  # what is free may have changed
        if needed + _SPARE_BYTES > self.about().free_bytes:
            raise DeviceError(
                f"{self.name} has {self.about().free_bytes / 1e6:.0f} MB free in {self._folder}, "
                f"{(needed + _SPARE_BYTES) / 1e6:.0f} MB are needed; delete something, or run `pruneport device clean`"
            )
        total, done, last = max(needed, 1), 0, time.monotonic()

        def tell(count: int) -> None:
            nonlocal done, last
            done += count
            if time.monotonic() - last > 1:
                last = time.monotonic()
                self._say(f"pushing: {done / total:.0%} of {total / 1e6:.0f} MB")

        if missing:
            self._say(f"pushing {len(missing)} files, {needed / 1e6:.1f} MB; {len(files) - len(missing)} are there")
        for source, to, sha256 in missing:
            self._send(source, to, sha256, tell)
        links = [
            f"ln -sfn {shlex.quote(where)} {shlex.quote(f'{place}/{name}')}" for name, where in self._bundles.items()
        ]
        self.shell.do("\n".join([f"mkdir -p {shlex.quote(place)}", *links]))

    def _there(self, paths: list[str]) -> dict[str, str]:
        """What the files that are on the device hash to."""
        quoted = " ".join(shlex.quote(path) for path in paths)
        text = self.shell.do(f'for f in {quoted}; do [ -f "$f" ] && sha256sum "$f"; done || true', timeout_s=1800)
        found = (line.split(maxsplit=1) for line in text.splitlines() if len(line.split(maxsplit=1)) == 2)
        return {path.strip().lstrip("*"): sha256 for sha256, path in found}

    def _send(self, source: Path, to: str, sha256: str, tell: Callable[[int], None]) -> None:
        """Sends a file, or the rest of one whose push broke off: what is there is kept if it is its beginning."""
        part = f"{to}.part"
        quoted = shlex.quote(part)
        parent = shlex.quote(to.rpartition("/")[0])
        told = self.shell.do(
            f"mkdir -p {parent}\n[ -f {quoted} ] || : > {quoted}\nstat -c %s {quoted}\nsha256sum {quoted}",
            timeout_s=600,
        ).split()
        start = int(told[0])
        if start > source.stat().st_size or sha256_of(source, start) != told[1]:
            self.shell.do(f": > {quoted}")
            start = 0
        elif start:
            self._say(f"{source.name}: {start / 1e6:.0f} MB are there, going on behind them")
        self.shell.append(source, start, part, tell)
        found = self.shell.do(f"sha256sum {quoted}", timeout_s=600).split()[0]
        if found != sha256:
            self.shell.do(f"rm -f {quoted}")
            raise DeviceError(f"{source.name} arrived damaged on {self.shell.serial}; run the same command again")
        self.shell.do(f"mv {quoted} {shlex.quote(to)}")

    def _run(self, job: JobFile, place: str, bundle: Bundle) -> None:
        quoted = shlex.quote(place)
        if self._runner is None:
            # Android lets no app follow a link that the shell made: it is told where the links lead.
            told = " ".join(f"--es {name} {shlex.quote(where)}" for name, where in self._bundles.items())
            readable = " ".join(shlex.quote(where) for where in self._bundles.values())
            above = " ".join(shlex.quote(f"{self._folder}{sub}") for sub in ("", "/jobs", "/bundles"))
            self.shell.do(
                f"chmod a+rx {above}\nchmod -R a+rX {quoted} {readable}\n"
                f"am start -W -S -n {APP}/.BenchActivity {told} --es job {quoted}"
            )
        else:
            runner = f"{self._folder}/runner"
            kind = "" if self.about().is_phone else "--kind emulated"
            packed = shlex.quote(f"{self._folder}/packed/{bundle.key}")
            words = f"{shlex.quote(f'{runner}/{self._runner.name}')} {quoted} {quoted}/out --packed {packed} {kind}"
            # Detached, so that it outlives the cable; the shell around it says how it ended.
            self.shell.do(
                f"mkdir -p {shlex.quote(f'{self._folder}/packed')}\n"
                f"chmod 755 {shlex.quote(f'{runner}/{self._runner.name}')}\n"
                f"export LD_LIBRARY_PATH={shlex.quote(runner)}\n"
                f"setsid sh -c 'echo $$ > {quoted}/pid; {words} > {quoted}/said 2> {quoted}/log; "
                f"echo $? > {quoted}/exit.part; mv {quoted}/exit.part {quoted}/exit' > /dev/null 2>&1 < /dev/null &"
            )
        try:
            self._wait(job, place)
        except BaseException as err:
            if not isinstance(err, _Lost):
                self._stop(place)
            raise

    def _wait(self, job: JobFile, place: str) -> None:
        """Follows a job to its end; a lost connection is waited for."""
        start, seen, lost = time.monotonic(), 0, False
        while True:
            if time.monotonic() - start > self._timeout_s:
                raise DeviceError(
                    f"the job did not end in {self._timeout_s:.0f} s and was stopped; allow more with --timeout, or "
                    "ask for fewer runs"
                )
            try:
                state, seen = self._look(place, seen)
            except _Lost as err:
                if not lost:
                    self._say(f"the connection was lost; {self.shell.serial} is waited for, the job goes on there")
                lost = True
                if time.monotonic() - start > self._timeout_s / 2:
                    raise _Lost(f"{err}; then `pruneport device pull` fetches what the job left") from err
                time.sleep(_POLL_S)
                continue
            if lost:
                self._say("the device is back")
                lost = False
            if state == "ended":
                return
            time.sleep(_POLL_S)

    def _look(self, place: str, seen: int) -> tuple[str, int]:
        """Passes on what the job said since `seen` bytes; `ended` where it did well, DeviceError where it did not."""
        quoted = shlex.quote(place)
        app = (
            f"pidof {APP} > /dev/null && echo alive"
            if self._runner is None
            # What was killed and that nobody has asked after is still listed, as a zombie.
            else f"grep ^State: /proc/$(cat {quoted}/pid)/status 2> /dev/null | grep -v Z"
        )
        out = f"{quoted}/out" if self._runner is not None else self._app_out(place)
        text = self.shell.do(
            f'echo "exit=$(cat {quoted}/exit 2> /dev/null)"\n'
            f'echo "state=$({app})"\n'
            f'echo "done=$({self._test(f"{out}/{FINDINGS}")})"\n'
            f"tail -c +{seen + 1} {quoted}/said 2> /dev/null || true",
            timeout_s=_LOOK_S,
        )
        head, said = text.split("\n")[:3], "\n".join(text.split("\n")[3:])
        code, alive, done = (line.partition("=")[2].strip() for line in head)
        whole = said[: said.rfind("\n") + 1] if not code else said
        for line in whole.splitlines():
            self._say(line)
        seen += len(whole.encode())
        if self._runner is None:
            if done:
                self._fetch_from_app(place)
                return "ended", seen
            if not alive:
                raise DeviceError(f"the app ended without findings: {self._why_app_ended()}")
            return "runs", seen
        if code == "0":
            return "ended", seen
        if code or not alive:
            raise DeviceError(self._why_ended(int(code) if code.isdigit() else None, place))
        return "runs", seen

    def _why_ended(self, code: int | None, place: str) -> str:
        _, log = self.shell.ask(f"tail -n 40 {shlex.quote(place)}/log")
        lines = [line for line in log.splitlines() if line.strip() and not re.match(r"[DI] \d", line)]
        last = lines[-1] if lines else "it said nothing"
        if code is None:
            return f"the runner is gone and left no word, as after a restart of {self.shell.serial}; run it again"
        if code == 128 + signal.SIGKILL:
            return (
                "the system killed the runner (signal 9), most likely for want of memory: the device has "
                f"{self.about().ram_bytes / 2**30:.1f} GiB; close other apps, or export a smaller model"
            )
        if code > 128:
            return f"the runner crashed (signal {code - 128}); the end of its log: {last}"
        if code in (126, 127) or "xec format" in last:
            return f"{self.shell.serial} cannot run the runner ({last}); build it for {self.about().abi}"
        return f"the runner ended with exit code {code}: {last}"

    def _test(self, path: str) -> str:
        run_as = f"run-as {APP} " if self._runner is None else ""
        return f"{run_as}ls {path} > /dev/null 2>&1 && echo yes"

    def _app_out(self, place: str) -> str:
        """Where the app leaves findings, in its own folder."""
        return f"files/jobs/{place.rpartition('/')[2]}"

    def _fetch_from_app(self, place: str) -> None:
        """Brings the findings from where only the app may read to the job's folder."""
        out = self._app_out(place)
        quoted = shlex.quote(place)
        self.shell.do(
            f"mkdir -p {quoted}/out\n"
            + "\n".join(f"run-as {APP} cat {out}/{name} > {quoted}/out/{name}" for name in (OUTPUTS, FINDINGS))
            + f"\nrun-as {APP} rm -rf {out}",
            timeout_s=600,
        )

    def _why_app_ended(self) -> str:
        _, text = self.shell.ask(f"dumpsys activity exit-info {APP}")
        found = _EXIT_REASON.search(text)
        if found is None:
            return "the system does not say why; see `adb logcat`"
        return f"{_EXIT_WORDS.get(int(found[1]), found[2].lower())}; see `adb logcat`"

    def _stop(self, place: str) -> None:
        quoted = shlex.quote(place)
        script = f"am force-stop {APP}" if self._runner is None else f"kill -9 -$(cat {quoted}/pid); true"
        try:
            self.shell.ask(script)
        except DeviceError as err:
            self._say(f"the job may still run on the device ({err})")
