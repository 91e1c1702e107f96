"""The built wheel beside nothing but what it declares: it starts, and it verifies a bundle without torch."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from runtime.bundle import read_bundle
from runtime.prompt import open_tokenizer

pytestmark = pytest.mark.slow

WHICH_ARE_THERE = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"


def declared(name: str, extra: str) -> set[str]:
    """`name` and all it needs, by name, following what each installed distribution declares."""
    found: set[str] = set()
    waiting = [(name, extra)]
    while waiting:
        at, extras = waiting.pop()
        for line in metadata.requires(at) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extras}):
                waiting += [(requirement.name, part) for part in (requirement.extras or {""})]
                found.add(requirement.name)
    return found


@pytest.fixture(scope="module")
def lean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, the dependencies of its `onnx` extra, and nothing else.

    The dependencies are linked from the environment that runs the tests, so that no index has to be reached;
    `pip check` then proves that the declared ones are complete.
    """
    home = tmp_path_factory.mktemp("lean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = home.glob("lib/python3*/site-packages")
    own = metadata.Distribution.at(next(site.glob("pruneport-*.dist-info")))
    needs = {Requirement(line).name for line in own.requires or [] if applies(line, "onnx")}
    for name in sorted(needs | {other for need in needs for other in declared(need, "")}):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            link = site / top
            if top != ".." and not link.exists():
                link.symlink_to(Path(str(metadata.distribution(name).locate_file(top))).resolve())
    checked = subprocess.run([*pip, "check"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    return home / "bin"


def applies(line: str, extra: str) -> bool:
    marker = Requirement(line).marker
    return marker is None or marker.evaluate({"extra": extra})


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Nothing of the checkout may be found by accident.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["COLUMNS"] = "250"  # so that no line of a table is broken
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def test_environment_has_no_torch(lean: Path, tmp_path: Path) -> None:
    program = (
        "import importlib.util as u; print([n for n in ('torch', 'executorch', 'transformers') if u.find_spec(n)])"
    )
    done = run(lean / "python", "-c", program, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


def test_rooms_are_not_top_level(lean: Path, tmp_path: Path) -> None:
    done = run(lean / "python", "-c", WHICH_ARE_THERE, "export", "pruning", "runtime", cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("start", [["pruneport"], ["python", "-m", "pruneport"]])
def test_wheel_starts(start: list[str], lean: Path, tmp_path: Path) -> None:
    words: list[str | Path] = [lean / start[0], *start[1:]]
    version = run(*words, "--version", cwd=tmp_path)
    assert (version.returncode, version.stdout) == (0, "pruneport 0.1.0\n"), version.stderr
    shown = run(*words, "export", "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "--prune-at" in shown.stdout


def test_verify_without_torch(lean: Path, onnx_bundle: Path, tmp_path: Path) -> None:
    done = run(lean / "pruneport", "verify", onnx_bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity" in done.stdout


def test_ask_without_torch(lean: Path, onnx_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(onnx_bundle)
    Image.fromarray(bundle.golden()["photo"]).save(tmp_path / "photo.png")
    question = "What is in this picture?"
    done = run(lean / "pruneport", "ask", onnx_bundle, tmp_path / "photo.png", question, cwd=tmp_path)
    answer = "".join(open_tokenizer(bundle).text(bundle.golden()["answer.ids"].tolist()))
    assert (done.returncode, done.stdout) == (0, f"{answer}\n"), done.stderr


def test_verify_without_the_engine_is_no_silent_pass(lean: Path, xnnpack_bundle: Path, tmp_path: Path) -> None:
    done = run(lean / "pruneport", "verify", xnnpack_bundle, cwd=tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "not checked" in done.stdout
    assert "pip install" in done.stdout


def test_export_without_torch_names_the_remedy(lean: Path, tmp_path: Path) -> None:
    done = run(lean / "pruneport", "export", "--model", "pocket", "--keep", "64", "--target", "android", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "pip install 'pruneport[export]'" in done.stderr
    assert "Traceback" not in done.stderr
