"""What the tests run on besides this machine: the native runner for x86_64 and for Arm, and a device behind real adb.

The device is Android's own adbd in a private network namespace, where nothing outside can reach it; programs for arm64
run there in QEMU's user mode. What is downloaded and built is kept in the user's cache and made once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pruneport-tests"
NATIVE = ROOT / "android" / "native"
EXECUTORCH = "executorch==1.5.1"
# Programs by the Debian package that brings them.
PROGRAMS = {
    "adb": "adb",
    "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu",
    "qemu-aarch64-static": "qemu-user-static",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "npm": "npm",
    "java": "default-jre-headless",
    "javac": "default-jdk-headless",
    "aapt": "aapt",
    "xmllint": "libxml2-utils",
}
# The first processor of Arm's with float16 arithmetic that phones had; QEMU's `max` computes int8 wrongly.
PROCESSOR = "cortex-a76"
LIBRARIES = (
    "libexecutorch.so",
    "libexecutorch_backend_xnnpack.so",
    "libexecutorch_kernels_optimized.so",
    "libexecutorch_kernels_quantized.so",
    "libexecutorch_threadpool.so",
)
# The head of an executable for little-endian aarch64, and which of its bits count.
_ELF = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
_MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"


def skip_unless_ci(reason: str) -> None:
    """Skips with the reason; where CI runs, what is missing is a failure."""
    if "CI" in os.environ:
        pytest.fail(reason)
    pytest.skip(reason)


def need(*programs: str) -> None:
    """Skips where one of PROGRAMS is missing, and says how to get it."""
    missing = [PROGRAMS[name] for name in programs if shutil.which(name) is None]
    if missing:
        skip_unless_ci(f"needs {', '.join(missing)}: apt-get install {' '.join(missing)}")


def ran(*words: str | Path, **options: Any) -> str:
    """What a command says that must succeed."""
    command = list(map(str, words))
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=800, **options
    )
    assert done.returncode == 0, f"{words[0]}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Keeps other processes out, such as those of a parallel test run."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def made_once(name: str) -> Iterator[Path | None]:
    """A folder of the cache to fill; None where it is there whole, by this process or another."""
    with locked(name):
        if (CACHE / name).is_dir():
            yield None
            return
        beside = CACHE / f".{name}.part"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        yield beside
        beside.replace(CACHE / name)


def unpack_npm(package: str, folder: Path) -> Path:
    """Unpacks a pinned package of npm's into a folder; returns where it lies. Skips without network."""
    need("npm")
    done = subprocess.run(["npm", "pack", package], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        skip_unless_ci(f"needs {package} from npm: {done.stderr[-300:]}")
    (packed,) = folder.glob("*.tgz")
    shutil.unpack_archive(packed, folder, filter="data")
    packed.unlink()
    return folder / "package"


def other_debian(folder: Path, suite: str, *, alone: bool = False) -> dict[str, str]:
    """Prepares a new folder for apt to fetch from another suite than this machine's; returns its environment.

    `alone`: nothing counts as installed, so that everything comes along. Skips where this is not Debian.
    """
    need("apt-get", "dpkg-deb")
    ours = Path("/etc/apt/sources.list.d/debian.sources")
    if not ours.exists():
        skip_unless_ci(f"needs Debian, whose {suite} is used: there is no {ours}")
    for sub in ("lists/partial", "cache/archives/partial", "sources"):
        (folder / sub).mkdir(parents=True)
    first = ours.read_text(encoding="utf-8").split("\n\n")[0]
    stanza = re.sub(r"^Suites:.*$", f"Suites: {suite}", first, flags=re.MULTILINE)
    (folder / "sources" / f"{suite}.sources").write_text(stanza + "\n", encoding="utf-8")
    settings = folder / "apt.conf"
    text = (
        f'Dir::State::lists "{folder}/lists";\nDir::Cache "{folder}/cache";\nDir::Etc::sourcelist "/dev/null";\n'
        f'Dir::Etc::sourceparts "{folder}/sources";\nAPT::Sandbox::User "root";\n'
    )
    if alone:
        (folder / "status").touch()
        text += f'Dir::State::status "{folder}/status";\nAPT::Install-Recommends "false";\nDebug::NoLocking "true";\n'
    settings.write_text(text, encoding="utf-8")
    return {**os.environ, "APT_CONFIG": str(settings)}


@cache
def arm_executorch() -> Path:
    """ExecuTorch's wheel for aarch64, unpacked: headers and libraries."""
    name = f"{EXECUTORCH.replace('==', '-')}-aarch64"
    with made_once(name) as folder:
        if folder is not None:
            words = (
                "--no-deps",
                "--only-binary=:all:",
                "--platform",
                "manylinux_2_28_aarch64",
                "--python-version",
                "311",
            )
            pip = (sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check")
            done = subprocess.run(
                [*pip, *words, EXECUTORCH, "-d", str(folder)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                skip_unless_ci(f"needs the wheel of {EXECUTORCH} for aarch64: {done.stderr[-300:]}")
            (wheel,) = folder.glob("*.whl")
            ran(sys.executable, "-m", "zipfile", "-e", wheel, folder)
            wheel.unlink()
    return CACHE / name / "executorch"


@cache
def native_runner(machine: str = "x86_64") -> Path:
    """The native runner, built as android/README.md says, with ExecuTorch's libraries beside it."""
    if find_spec("cmake") is None:
        skip_unless_ci("needs CMake: pip install cmake")
    if not Path("/usr/include/nlohmann/json.hpp").exists():
        skip_unless_ci("needs nlohmann-json3-dev: apt-get install nlohmann-json3-dev")
    arm = machine == "aarch64"
    if not arm and platform.machine() != machine:
        pytest.skip(f"this machine is {platform.machine()}, not {machine}")
    if arm:
        need("aarch64-linux-gnu-g++")
    package = find_spec("executorch")
    assert package is not None
    assert package.submodule_search_locations
    sdk = arm_executorch() if arm else Path(next(iter(package.submodule_search_locations)))
    sources = sorted((*NATIVE.rglob("*.cpp"), *NATIVE.rglob("*.h"), NATIVE / "CMakeLists.txt"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    name = f"native-{machine}-{digest}"
    with made_once(name) as folder:
        if folder is not None:
            cmake = (sys.executable, "-m", "cmake")
            build = folder / "build"
            cross = (
                "-DCMAKE_SYSTEM_NAME=Linux",
                "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
                "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
            )
            settings = ("-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_PREFIX_PATH={sdk}", *(cross if arm else ()))
            ran(*cmake, "-S", NATIVE, "-B", build, *settings)
            ran(*cmake, "--build", build, "-j", "2")
            shutil.copy(build / "pruneport_runner", folder)
            for library in LIBRARIES:
                shutil.copy(sdk / "lib" / library, folder)
            shutil.rmtree(build)
    return CACHE / name / "pruneport_runner"


@cache
def _adbd() -> Path:
    """Android's adbd as Debian 13 builds it, unpacked with the libraries it needs."""
    name = "adbd-trixie"
    with made_once(name) as folder:
        if folder is not None:
            apt, debs = folder / "apt", folder / "debs"
            env = other_debian(apt, "trixie")
            debs.mkdir()
            ran("apt-get", "-qq", "update", env=env)
            no = [f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")]
            told = ran("apt-cache", "depends", "--recurse", *no, "adbd", env=env)
            packages = sorted({line for line in told.splitlines() if line[:1].isalpha()})
            ran("apt-get", "-qq", "download", *packages, env=env, cwd=debs)
            for deb in debs.glob("*.deb"):
                ran("dpkg-deb", "-x", deb, folder / "root")
            for sub in (apt, debs):
                shutil.rmtree(sub)
    return CACHE / name / "root"


@dataclass
class EmulatedDevice:
    """A running adbd; `adb` is a program that talks to it from outside, `folder` where bundles go on it."""

    serial: str
    adb: Path
    folder: str
    path: Path
    holder: int

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs adb."""
        return subprocess.run([str(self.adb), *words], capture_output=True, text=True, check=check, timeout=120)

    def shell(self, script: str) -> str:
        """Runs a script on the device."""
        return self.run("-s", self.serial, "shell", script).stdout

    def unplug(self) -> None:
        """Pulls the cable."""
        self.run("disconnect", self.serial)

    def plug_in(self) -> None:
        self.run("connect", self.serial)


@contextmanager
def emulated_device(place: Path, *, size_mb: int = 600) -> Iterator[EmulatedDevice]:
    """Starts a device whose storage holds `size_mb`; ends it, and all that runs on it, behind the block."""
    need("adb", "qemu-aarch64-static", "nsenter")
    root, data = _adbd(), place / "data"
    data.mkdir(parents=True)
    bin_dir = place / "bin"  # what the device has beside this machine's own programs
    bin_dir.mkdir()
    libraries = f"{root}/usr/lib/x86_64-linux-gnu/android:{root}/usr/lib/x86_64-linux-gnu"
    loader = f"{root}/usr/lib64/ld-linux-x86-64.so.2"
    script = f"""
set -e
ip link set lo up
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
echo ':arm64:M::{_ELF}:{_MASK}:{shutil.which("qemu-aarch64-static")}:F' > /proc/sys/fs/binfmt_misc/register
mount -t tmpfs -o size={size_mb}M tmpfs {data}
export QEMU_CPU={PROCESSOR} QEMU_LD_PREFIX=/usr/aarch64-linux-gnu PATH={bin_dir}:$PATH
exec {loader} --library-path {libraries} {root}/usr/lib/android-sdk/platform-tools/adbd
"""
    log = (place / "adbd.log").open("w")
    holder = subprocess.Popen(
        ["unshare", "-U", "-r", "-n", "-m", "-p", "-f", "--kill-child", "--mount-proc", "bash", "-c", script],
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        # unshare forks: its child is the first process of the namespaces.
        deadline = time.monotonic() + 30
        inner = ""
        while not inner or "adbd started" not in (place / "adbd.log").read_text(errors="replace"):
            if holder.poll() is not None or time.monotonic() > deadline:
                reason = (place / "adbd.log").read_text(errors="replace")[-500:]
                skip_unless_ci(f"needs namespaces of its own for the device (unshare): {reason}")
            time.sleep(0.1)
            inner = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text().strip()
        adb = place / "adb"
        adb.write_text(
            f'#!/bin/sh\nexec nsenter -t {inner} -U -n -m -p --preserve-credentials {shutil.which("adb")} "$@"\n'
        )
        adb.chmod(0o755)
        device = EmulatedDevice("localhost:5555", adb, f"{data}/pruneport", bin_dir, int(inner))
        device.plug_in()
        for _ in range(100):
            if device.run("-s", device.serial, "get-state", check=False).stdout.strip() == "device":
                break
            time.sleep(0.1)
        yield device
    finally:
        holder.kill()
        holder.wait()
        log.close()
