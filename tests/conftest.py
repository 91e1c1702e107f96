"""Fixtures that more than one test file needs: the checkout, its command line, a wheel, photos and ready bundles."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The subset of golden vectors that lies beside the tests has no decoder: its weights alone are larger than the rest.
if not (Path(os.environ.get("PRUNEPORT_GOLDEN") or ROOT / "tests" / "golden") / "decoder.json").exists():
    collect_ignore = ["export/test_decoder_golden.py"]

# Programs that a machine may lack. Where .ci/run runs it has installed them, and their absence is a failure.
CHROMIUM = Path("/usr/bin/chromium")
HEADLESS_CHROMIUM = (
    str(CHROMIUM),
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# Debian's package of Chromium brings a loader for Vulkan and SwiftShader, a driver that computes on the CPU.
DRIVERS = Path("/usr/lib") / CHROMIUM.name
SOFTWARE_GPU = {"VK_ICD_FILENAMES": str(DRIVERS / "vk_swiftshader_icd.json"), "LD_LIBRARY_PATH": str(DRIVERS)}
needs_chromium = pytest.mark.skipif(
    not CHROMIUM.exists() and "CI" not in os.environ, reason="needs Chromium: apt-get install chromium"
)
needs_node = pytest.mark.skipif(
    not (shutil.which("node") and shutil.which("npm")) and "CI" not in os.environ,
    reason="needs Node and npm: apt-get install nodejs npm",
)

CommandLine = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="module")
def software_gpu() -> Iterator[None]:
    """A GPU that computes on the CPU, where Chromium's driver for one is installed."""
    if not DRIVERS.is_dir():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VK_ICD_FILENAMES", SOFTWARE_GPU["VK_ICD_FILENAMES"])
        patch.setenv("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
        # Found again by name when the delegate asks for it; the path of libraries cannot change in a running process.
        ctypes.CDLL(str(DRIVERS / "libvulkan.so.1"), mode=os.RTLD_GLOBAL)
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For some thousand small operators threads gain little, and lose minutes where other work holds the cores."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def command_line() -> CommandLine:
    """Runs `python -m pruneport ...` from the checkout as a user would: own process, output captured."""

    def run(
        *words: str | Path, env: Mapping[str, str] | None = None, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pruneport", *map(str, words)],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with the hatchling that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """What `make demo` runs after the install: its own command line, with this interpreter and another folder."""
    folder = tmp_path_factory.mktemp("demo")
    dry = subprocess.run(
        ["make", "--no-print-directory", "-n", "demo", f"DEMO_DIR={folder / 'bundles'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in dry.stdout.splitlines() if "export.py" in line)
    return subprocess.run(
        [sys.executable, *shlex.split(line.lstrip("@"))[1:]],
        cwd=ROOT,
        # Wide enough that no line of the table is broken.
        env={**os.environ, "COLUMNS": "250"},
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )


@pytest.fixture(scope="session")
def xnnpack_bundle(demo: subprocess.CompletedProcess[str]) -> Path:
    """The demo's pruned bundle, for ExecuTorch; not to be changed. Its unpruned twin lies beside it."""
    assert demo.returncode == 0, demo.stdout + demo.stderr
    line = next(line for line in demo.stdout.splitlines() if line.startswith("next: "))
    return Path(shlex.split(line)[-1])


@pytest.fixture(scope="session")
def onnx_bundle(tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Path:
    """The pocket model with 64 image tokens, exported for ONNX Runtime; not to be changed."""
    folder = tmp_path_factory.mktemp("onnx")
    words = ["export", "--model", "pocket", "--keep", "64", "--target", "android", "--backend", "onnx", "-q"]
    done = command_line(*words, "--output-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return Path(done.stdout.strip())
