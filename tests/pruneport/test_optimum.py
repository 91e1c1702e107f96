"""`optimum-cli export pruneport`: flags, messages and bundle of `pruneport export`, from checkout and wheel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import cli
from export.families import MODELS
from tests.conftest import CommandLine

OPTIMUM_CLI = Path(sysconfig.get_path("scripts")) / "optimum-cli"
REGISTRATION = "optimum/commands/register/register_pruneport.py"
POCKET = ["--model", "pocket", "--keep", "64", "--target", "android"]
EVERY_FLAG = [
    *POCKET,
    *("--backend", "onnx", "--precision", "fp32", "--quant-vision", "8da8w", "--cut", "0"),
    *("--only", "vision", "--twin", "--weights", "random", "--seed", "7", "--image", "photo.jpg", "--dry-run", "-q"),
]

OptimumCli = Callable[..., subprocess.CompletedProcess[str]]


def run(*words: str | Path, cwd: Path, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command that finds pruneport where it is installed or under `python_path`, and nowhere by accident."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    if python_path is not None:
        env["PYTHONPATH"] = str(python_path)
    return subprocess.run(
        [*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def optimum_cli(root: Path, tmp_path: Path) -> OptimumCli:
    """Runs `optimum-cli ...` in an empty folder, the checkout on the path as the editable install puts it there."""

    def started(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, OPTIMUM_CLI, *words, cwd=tmp_path, python_path=root)

    return started


def flags(*, optimum: bool) -> set[str]:
    text = cli.build_parser(optimum=optimum)[1]["export"].format_help()
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def test_flags_are_those_of_the_export_verb() -> None:
    """But for the folder, which is no flag here."""
    assert flags(optimum=True) == flags(optimum=False) - {"--output-dir"}
    assert "--output-dir" in flags(optimum=False)


@pytest.mark.parametrize("words", [POCKET, EVERY_FLAG])
def test_same_words_ask_for_the_same(words: list[str]) -> None:
    """The folder may stand anywhere, as argparse has it."""
    asked = vars(cli.parse(["export", *words, "--output-dir", "out"]))
    assert vars(cli.parse(["export", *words, "out"], optimum=True)) == asked
    assert vars(cli.parse(["export", "out", *words], optimum=True)) == asked


def test_listed_by_optimum(optimum_cli: OptimumCli) -> None:
    listed = optimum_cli("export", "--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert re.search(r"^    pruneport +Export a phone-ready bundle", listed.stdout, re.MULTILINE)


def test_help_is_pruneports(optimum_cli: OptimumCli) -> None:
    shown = optimum_cli("export", "pruneport", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("usage: optimum-cli export pruneport [-h] --model M")
    assert "OUT" in shown.stdout
    assert cli.EXIT_CODES.split(":")[0] in shown.stdout


@pytest.mark.parametrize(
    ("words", "loads_pruneport"),
    [(["--help"], False), (["export", "--help"], False), (["export", "pruneport", "--help"], True)],
)
def test_help_needs_nothing_heavy(words: list[str], loads_pruneport: bool, root: Path, tmp_path: Path) -> None:
    """Nor pruneport itself, unless it is asked: optimum loads the registration for every other command too."""
    heavy = ["torch", "transformers", "onnxruntime", "onnx", "executorch", "coremltools", "numpy", "PIL", "msgspec"]
    program = f"""
import sys
for name in {heavy!r}:
    sys.modules[name] = None
from optimum.commands.optimum_cli import main
sys.argv = ["optimum-cli", *{words!r}]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
assert "optimum.commands.register.register_pruneport" in sys.modules
print("pruneport" in sys.modules)
"""
    done = run(sys.executable, "-c", program, cwd=tmp_path, python_path=root)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == str(loads_pruneport)


@pytest.mark.slow
def test_dry_run_says_what_pruneport_says(
    optimum_cli: OptimumCli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    here = optimum_cli("export", "pruneport", *POCKET, "--dry-run", out)
    assert cli.main(["export", *POCKET, "--dry-run", "--output-dir", str(out)], version="0") == 0
    there = capsys.readouterr()
    assert (here.returncode, here.stderr, there.err) == (0, "", "")
    assert f"makes    {out / 'pocket-keep64-android-xnnpack'}\n" in here.stdout
    # What is free on the machine changes between any two runs.
    assert here.stdout.split("\n  needs ")[0] == there.out.split("\n  needs ")[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (POCKET, "the following arguments are required: OUT; see optimum-cli export pruneport --help"),
        ([*POCKET, "a", "b"], "unrecognized arguments: b; see optimum-cli export pruneport --help"),
        (
            [*POCKET, "--output-dir", "out"],
            "unknown argument '--output-dir'; see optimum-cli export pruneport --help",
        ),
        (
            ["--modle", "pocket", "out"],
            "unknown argument '--modle', did you mean '--model'?; see optimum-cli export pruneport --help",
        ),
        (
            ["--model", "pokcet", *POCKET[2:], "out"],
            f"unknown model 'pokcet', did you mean 'pocket'?; allowed: {', '.join(MODELS)}, auto",
        ),
    ],
)
def test_mistakes_get_one_message(words: list[str], message: str, optimum_cli: OptimumCli, tmp_path: Path) -> None:
    done = optimum_cli("export", "pruneport", *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"pruneport: error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_wheel_adds_one_file_to_optimum(wheel: Path, root: Path) -> None:
    """And no __init__.py: one anywhere above the file would hide optimum's own folders."""
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.startswith("optimum/")] == [REGISTRATION]
        assert archive.read(REGISTRATION) == (root / REGISTRATION).read_bytes()


def editable(folder: Path, root: Path) -> Path:
    """What `pip install --editable` installs: a wheel that points at the checkout."""
    program = "import sys; from hatchling.build import build_editable; print(build_editable(sys.argv[1]))"
    built = run(sys.executable, "-c", program, folder, cwd=root)
    assert built.returncode == 0, built.stderr
    return folder / built.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_installed(kind: str, wheel: Path, root: Path, tmp_path: Path) -> None:
    """In an environment of its own, which takes all but pruneport from the one that runs the tests."""
    home, elsewhere, built = (tmp_path / name for name in ("home", "elsewhere", "built"))
    elsewhere.mkdir()
    built.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = home / "bin" / "python"
    package = wheel if kind == "wheel" else editable(built, root)
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(package)], check=True)
    (site,) = home.glob("lib/python3*/site-packages")
    # A .pth file found through another one is not read, so an editable pruneport of that environment stays unseen.
    (site / "everything_else.pth").write_text(sysconfig.get_path("purelib"))

    where = run(python, "-c", "import pruneport; print(pruneport.__file__)", cwd=elsewhere)
    assert Path(where.stdout.strip()).is_relative_to(site if kind == "wheel" else root), where.stderr
    shown = run(python, OPTIMUM_CLI, "export", "pruneport", "--help", cwd=elsewhere)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: optimum-cli export pruneport ")
    planned = run(python, OPTIMUM_CLI, "export", "pruneport", *POCKET, "--dry-run", "out", cwd=elsewhere)
    assert (planned.returncode, planned.stderr) == (0, "")
    assert "makes    out/pocket-keep64-android-xnnpack\n" in planned.stdout


def made(bundle: Path) -> dict[str, Any]:
    """What a bundle's manifest says of the bundle itself, without when it was made."""
    manifest: dict[str, Any] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    kept = ("name", "model", "weights", "target", "prune", "graphs", "image", "prompt", "tools")
    return {field: manifest[field] for field in kept}


@pytest.mark.slow
def test_bundle_is_the_one_pruneport_makes(
    optimum_cli: OptimumCli, command_line: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*POCKET, "--backend", "onnx", "--only", "vision", "-q"]
    here = optimum_cli("export", "pruneport", *words, tmp_path / "here")
    there = command_line("export", *words, "--output-dir", tmp_path / "there")
    assert (here.returncode, here.stderr) == (there.returncode, there.stderr) == (0, "")
    bundle = tmp_path / "here" / "pocket-keep64-android-onnx-vision"
    assert here.stdout == f"{bundle}\n"
    assert list(bundle.parent.iterdir()) == [bundle]
    assert made(bundle) == made(Path(there.stdout.strip()))
