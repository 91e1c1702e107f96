"""The built wheel beside nothing but what it declares: it starts, verifies without torch, and is what users import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from itertools import takewhile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

import pruneport
from runtime.bundle import read_bundle
from runtime.prompt import open_tokenizer
from tests.pruneport.test_python import foreign_rooms

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


def run(*words: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    # Nothing of the checkout may be found by accident.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | variables
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
    assert "--cut" in shown.stdout


def test_verify_without_torch(lean: Path, onnx_bundle: Path, tmp_path: Path) -> None:
    done = run(lean / "pruneport", "verify", onnx_bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "parity" in done.stdout


def test_ask_without_torch(lean: Path, onnx_bundle: Path, tmp_path: Path) -> None:
    bundle = read_bundle(onnx_bundle)
    Image.fromarray(bundle.golden()["photo"]).save(tmp_path / "photo.png")
    question = "What is in this picture?"
    done = run(lean / "pruneport", "ask", onnx_bundle, tmp_path / "photo.png", question, cwd=tmp_path)
    assert bundle.manifest.text is not None
    ends = bundle.manifest.text.end_ids  # the golden goes on behind them
    said = list(takewhile(lambda token: token not in ends, bundle.golden()["answer.ids"].tolist()))
    answer = "".join(open_tokenizer(bundle).text(said))
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


# `import pruneport`, beside modules of somebody else that have the rooms' names


def examples(root: Path, part: str) -> str:
    """The examples of one part of the page, as one program."""
    text = (root / "docs" / "python.md").read_text(encoding="utf-8").split(f"\n## {part}\n")[1].split("\n## ")[0]
    found = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found
    return "\n".join(found)


WHERE = """
import sys
import pruneport.runtime.bundle
import export, pruning, runtime.bundle
assert export.MINE and pruning.MINE and runtime.MINE and runtime.bundle.MINE
print(sorted({"torch", "transformers"} & set(sys.modules)), pruneport.runtime.bundle.__file__)
"""


def test_examples_without_torch(lean: Path, onnx_bundle: Path, root: Path, tmp_path: Path) -> None:
    foreign_rooms(tmp_path)
    (tmp_path / "bundles").symlink_to(onnx_bundle.parent)
    golden = read_bundle(onnx_bundle).golden()
    Image.fromarray(golden["photo"]).save(tmp_path / "photo.jpg", quality=95)
    (tmp_path / "program.py").write_text(examples(root, "Without PyTorch") + WHERE, encoding="utf-8")
    done = run(lean / "python", "-W", "error", "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "passed"
    assert "bundles/nothing does not exist" in done.stdout
    loaded, where = lines[-1].split(" ")
    assert (loaded, Path(where).is_relative_to(lean.parent)) == ("[]", True)


def test_examples_with_torch(lean: Path, root: Path, tmp_path: Path) -> None:
    """The wheel's environment, which finds what the exporter needs in the one that runs the tests."""
    foreign_rooms(tmp_path)
    (tmp_path / "program.py").write_text(examples(root, "With PyTorch") + WHERE, encoding="utf-8")
    done = run(
        lean / "python",
        "program.py",
        cwd=tmp_path,
        PYTHONPATH=sysconfig.get_path("purelib"),
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "bundles/pocket-keep64-android-onnx passed"
    assert Path(lines[-1].split("] ")[1]).is_relative_to(lean.parent)
    assert (tmp_path / "bundles" / "pocket-keep64-android-onnx" / "manifest.json").is_file()


MYPY = (sys.executable, "-m", "mypy", "--strict", "--python-executable")
USER = """
from typing import assert_type

import pruneport


def tell(path: str) -> str:
    try:
        verdict = pruneport.verify(path)
    except pruneport.BundleError as error:
        assert_type(error.exit_code, int)
        return str(error)
    assert_type(verdict.passed, bool)
    with pruneport.open_bundle(path) as bundle:
        answer = bundle.ask("photo.jpg", "What?", temperature=0.5)
        assert_type(next(answer), str)
        assert_type(answer.took.token_ms, tuple[float, ...])
    made = pruneport.export_bundle(model="pocket", keep="all", output_dir="bundles")
    assert_type(made.verdict, pruneport.Verdict)
    assert_type(made, pruneport.Exported)
    assert_type(pruneport.PruneSpec(keep=64).tokens, int)
    return ", ".join(step.name for step in pruneport.verify(made.path).failed_steps)


"""


def test_types_of_a_users_program(lean: Path, tmp_path: Path) -> None:
    foreign_rooms(tmp_path)
    revealed = "".join(f"reveal_type(pruneport.{name})\n" for name in pruneport.__all__)
    (tmp_path / "program.py").write_text(USER + revealed, encoding="utf-8")
    done = run(*MYPY, lean / "python", "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    types = re.findall(r'note: Revealed type is "(.*)"', done.stdout)
    assert len(types) == len(pruneport.__all__)
    assert "Any" not in types


def test_types_are_checked(lean: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import pruneport\npruneport.verify('x').pased\npruneport.verfy\n", encoding="utf-8"
    )
    done = run(*MYPY, lean / "python", "program.py", cwd=tmp_path)
    assert done.returncode == 1
    assert '"Verdict" has no attribute "pased"' in done.stdout
    assert 'Module has no attribute "verfy"' in done.stdout
