"""The house rules: which room may import which, what stays out of start-up, and what the wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOMS = ("pruneport", "export", "pruning", "runtime")
MAY_IMPORT = {
    "pruneport": {"pruneport", "export"},
    "export": {"export", "pruning", "runtime"},
    "pruning": {"pruning"},
    "runtime": {"runtime"},
}
# Where a room's own library may be used: pruning is written in torch, runtime must do without.
TORCH_FAMILY = {"torch", "torchao", "torchvision", "transformers", "onnxscript", "coremltools", "optimum"}
# What an engine cannot do without, imported when it is used.
NEEDED_BY_ENGINES = {Path("runtime/engines/executorch.py"): "torch", Path("runtime/engines/coreml.py"): "coremltools"}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """(top-level package, whether it is imported when the file is) for each import that can really happen."""

    def visit(node: ast.AST, at_import: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; rooms import each other by name"
            yield (node.module or "").split(".")[0], at_import
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.orelse:
                yield from visit(statement, at_import)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import and not inside)

    yield from visit(ast.parse(source), True)


def annotation_imports(source: str) -> set[str]:
    """Packages imported anywhere at all, `if TYPE_CHECKING` included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def files_of(root: Path, room: str) -> list[Path]:
    return sorted((root / room).rglob("*.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way(root: Path, room: str) -> None:
    files = files_of(root, room)
    assert files, f"{room} is empty"
    for file in files:
        others = annotation_imports(file.read_text(encoding="utf-8")) & set(ROOMS)
        assert others <= MAY_IMPORT[room], f"{file.relative_to(root)} imports {others - MAY_IMPORT[room]}"


def test_nothing_imports_the_launcher_tests_or_benchmarks(root: Path) -> None:
    for room in ROOMS:
        for file in files_of(root, room):
            assert not annotation_imports(file.read_text(encoding="utf-8")) & {"tests", "benchmarks", "conftest"}, file
    for file in files_of(root, "benchmarks"):
        assert not annotation_imports(file.read_text(encoding="utf-8")) & {"tests", "conftest"}, file


def imported_modules(source: str, known: Iterable[str]) -> set[str]:
    """Those of the known modules that a file imports, wherever it does, `if TYPE_CHECKING` included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    # A package is imported before what is in it, but that is no reason to call them a circle.
    found -= {name for name in found if any(other.startswith(f"{name}.") for other in found & set(known))}
    return found & set(known)


def test_no_circle_of_imports(root: Path) -> None:
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for room in ROOMS
        for file in files_of(root, room)
    }
    graph = {name: imported_modules(file.read_text(encoding="utf-8"), files) - {name} for name, file in files.items()}
    assert sum(map(len, graph.values())) > len(files), "the imports were not found"
    TopologicalSorter(graph).prepare()  # CycleError names a circle


def test_a_circle_would_be_found() -> None:
    known = {"export.a", "export.b"}
    sources = {"export.a": "def f():\n    from export import b", "export.b": "import export.a"}
    graph = {name: imported_modules(source, known) for name, source in sources.items()}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_runtime_knows_no_torch(root: Path) -> None:
    for file in files_of(root, "runtime"):
        found = [(name, early) for name, early in imports(file.read_text(encoding="utf-8")) if name in TORCH_FAMILY]
        needed = NEEDED_BY_ENGINES.get(file.relative_to(root))
        if needed is not None:
            assert found == [(needed, False)] * len(found), f"{file} must import only {needed}, and inside a function"
        else:
            assert not found, f"{file.relative_to(root)} imports {found}"


# Words that only one room may know: a method's in `pruning`, a converter's, an engine's or a family's outside it.
FOREIGN_TO_RUNTIME = ("vlm", "uniform", "pivot", "threshold", "llava", "vicuna")
FOREIGN_TO_PRUNING = (
    "xnnpack",
    "onnx",
    "vulkan",
    "nnapi",
    "qnn",
    "coreml",
    "executorch",
    "llava",
    "clip_",
    "snapdragon",
)


@pytest.mark.parametrize(("room", "words"), [("runtime", FOREIGN_TO_RUNTIME), ("pruning", FOREIGN_TO_PRUNING)])
def test_rooms_do_not_name_what_is_not_theirs(root: Path, room: str, words: tuple[str, ...]) -> None:
    files = [file for file in (root / room).rglob("*") if file.suffix in (".py", ".j2")]
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8").lower()
        assert not [word for word in words if word in text], file.relative_to(root)


def test_only_its_engines_name_delegates(root: Path) -> None:
    """A bundle's manifest tells the rest of `runtime` what it must know of who made a graph."""
    for file in files_of(root, "runtime"):
        if file.parent.name != "engines":
            text = file.read_text(encoding="utf-8").lower()
            assert not [name for name in ("xnnpack", "vulkan", "nnapi", "webgpu", "qnn") if name in text], file


def test_import_walk_sees_what_it_should() -> None:
    source = """
import a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import hidden
else:
    import shown
def f():
    from c.d import e
class K:
    import g
    def m(self): import h
"""
    assert set(imports(source)) == {
        ("a", True),
        ("typing", True),
        ("shown", True),
        ("c", False),
        ("g", True),
        ("h", False),
    }
    assert "hidden" in annotation_imports(source)


def test_runtime_imports_where_torch_is_missing(root: Path) -> None:
    modules = [".".join(file.relative_to(root).with_suffix("").parts) for file in files_of(root, "runtime")]
    modules = [module.removesuffix(".__init__") for module in modules]
    program = f"""
import importlib, sys
sys.path.insert(0, {str(root)!r})
for name in {sorted(TORCH_FAMILY)!r}:
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


HEAVY = (
    "torch",
    "transformers",
    "onnxruntime",
    "onnx",
    "executorch",
    "coremltools",
    "numpy",
    "PIL",
    "jinja2",
    "rich",
    "starlette",
    "uvicorn",
)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["export", "--help"],
        ["verify", "--help"],
        ["serve", "--help"],
        ["explain", "--help"],
        ["sweep", "--help"],
        ["--version"],
    ],
)
def test_help_loads_nothing_heavy(root: Path, words: list[str]) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(root)!r})
from pruneport import main
try:
    main({words!r})
except SystemExit as stop:
    assert stop.code == 0, stop.code
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_answers_within_half_a_second(root: Path) -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "export.py", "--help"], cwd=root, stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - start)
    # The best of three: the question is what start-up costs, not what else this machine was doing.
    assert min(seconds) < 0.5, seconds


def test_wheel_nests_the_rooms(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"pruneport", "optimum", "pruneport-0.1.0.dist-info"}
    expected = {
        file.relative_to(root).as_posix() if room == "pruneport" else f"pruneport/{file.relative_to(root).as_posix()}"
        for room in ROOMS
        for file in (root / room).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in names if name.startswith("pruneport/")} == expected
    assert {
        "pruneport/runtime/templates/report.html.j2",
        "pruneport/runtime/rewrites.json",
        "pruneport/runtime/serve/page/page.js",
        "pruneport/export/models/pocket/model.safetensors",
        "pruneport/export/models/pocket-questions/questions.jsonl",
    } <= expected
    assert "pruneport-0.1.0.dist-info/licenses/LICENSE" in names


def test_wheel_runtime_dependencies_hold_no_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read("pruneport-0.1.0.dist-info/METADATA").decode()
    required = [line.split(": ", 1)[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    base = [requirement for requirement in required if "extra ==" not in requirement]
    assert base
    assert not any(requirement.startswith(tuple(TORCH_FAMILY | {"executorch"})) for requirement in base)
    export = [requirement for requirement in required if "extra == 'export'" in requirement]
    assert export
    assert all("==" in requirement.split(";")[0] for requirement in export), "export pins must be exact"
