"""`import pruneport` as a user has it: its names, what they load, and the rooms under both of their names."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

import pruneport
from export.cli import build_parser
from export.request import Request
from tests.pruneport.test_layout import HEAVY


def run(program: str, root: Path, cwd: Path) -> str:
    """What a program prints that finds the checkout last on its path, behind its own folder."""
    (cwd / "program.py").write_text(f"import sys\nsys.path.insert(1, {str(root)!r})\n{program}", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def foreign_rooms(folder: Path) -> None:
    """Modules of somebody else, of the rooms' names: two packages, one of which has a `bundle`, and a plain file."""
    for package in ("export", "runtime"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("MINE = True\n")
    (folder / "runtime" / "bundle.py").write_text("MINE = True\n")
    (folder / "pruning.py").write_text("MINE = True\n")


def test_every_name_is_there_and_says_what_it_is() -> None:
    assert dir(pruneport) == sorted(pruneport.__all__)
    for name in set(pruneport.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(pruneport, name)), name


def test_what_type_checkers_are_told_is_what_is_there() -> None:
    tree = ast.parse(inspect.getsource(pruneport))
    (told,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "verify")
    there = inspect.signature(pruneport.verify).parameters
    assert [argument.arg for argument in (*told.args.args, *told.args.kwonlyargs)] == list(there)
    assert [ast.unparse(default) for default in told.args.kw_defaults if default] == ["None"] * (len(there) - 1)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'pruneport' has no attribute 'verfy'"):
        pruneport.verfy  # type: ignore[attr-defined]  # noqa: B018


def test_export_takes_what_the_command_line_takes() -> None:
    parameters = dict(inspect.signature(pruneport.export_bundle).parameters)
    assert parameters.pop("progress").default is False
    assert parameters.pop("resume").default is False
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert [name for name, parameter in parameters.items() if parameter.default is inspect.Parameter.empty] == [
        "model",
        "keep",
    ]
    assert list(parameters) == [field.name for field in fields(Request)]
    for field in fields(Request):
        if field.name != "target":  # of which the command line has a default of its own
            assert field.default is MISSING or str(field.default) == str(parameters[field.name].default), field.name
    target = build_parser()[1]["export"].get_default("target")
    assert parameters["target"].default == target


def test_export_refuses_as_the_command_line_does(tmp_path: Path) -> None:
    with pytest.raises(pruneport.RequestError, match=r"keep=577 must lie in 1\.\.576"):
        pruneport.export_bundle(model="pocket", keep=577, output_dir=tmp_path)
    with pytest.raises(pruneport.RequestError, match="did you mean 'pocket'"):
        pruneport.export_bundle(model="pokcet", keep="all", output_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_import_loads_nothing_heavy(root: Path, tmp_path: Path) -> None:
    shown = run(f"import pruneport\nprint([n for n in {HEAVY!r} if n in sys.modules])", root, tmp_path)
    assert shown == "[]\n"


def test_names_that_need_torch_say_so(root: Path, tmp_path: Path) -> None:
    program = """
sys.modules["torch"] = None
import pruneport
try:
    pruneport.TokenPruner
except ImportError as error:
    print(error)
"""
    assert run(program, root, tmp_path) == (
        "pruneport.TokenPruner needs torch, which is not installed here; run: pip install 'pruneport[export]'\n"
    )


@pytest.mark.parametrize(
    "order",
    [
        ["runtime.bundle", "pruneport.runtime.bundle"],
        ["pruneport.runtime.bundle", "runtime.bundle"],
        ["runtime.errors", "pruneport.export.request", "export.request", "runtime.bundle", "pruneport.runtime.bundle"],
        ["export.request", "pruneport.runtime.bundle"],
    ],
    ids=" ".join,
)
def test_rooms_are_one_under_both_names(order: list[str], root: Path, tmp_path: Path) -> None:
    program = f"""
import pickle
from importlib import import_module
for name in {order!r}:
    import_module(name)
import pruneport.runtime.bundle, pruneport.runtime.errors, pruneport.export.request
import runtime.bundle, runtime.errors, export.request
assert runtime.bundle is pruneport.runtime.bundle
assert runtime.errors.BundleError is pruneport.runtime.errors.BundleError is runtime.bundle.BundleError
assert export.request is pruneport.export.request
assert export.request.RequestError is pruneport.RequestError
assert type(pickle.loads(pickle.dumps(pruneport.BundleError("x")))) is runtime.errors.BundleError
files = [getattr(module, "__file__", "") for module in set(sys.modules.values())]
print(files.count(runtime.bundle.__file__))
"""
    assert run(program, root, tmp_path) == "1\n"


@pytest.mark.parametrize("first", ["", "import export, pruning, runtime.bundle"], ids=["after", "before"])
def test_foreign_modules_of_the_same_names(first: str, root: Path, tmp_path: Path) -> None:
    foreign_rooms(tmp_path)
    program = f"""
{first}
import pruneport
path = list(sys.path)
try:
    pruneport.verify("nothing")
except pruneport.BundleError as error:
    print(error)
try:
    pruneport.export_bundle(model="pocket", keep=0)
except pruneport.RequestError as error:
    print(error)
import export, pruning, runtime.bundle
assert export.MINE and pruning.MINE and runtime.MINE and runtime.bundle.MINE
import pruneport.runtime.bundle
assert issubclass(pruneport.runtime.bundle.BundleError, pruneport.PruneportError)
assert sys.path == path
"""
    said = run(program, root, tmp_path).splitlines()
    assert [line.split(";")[0] for line in said] == [
        "nothing does not exist",
        "keep=0 must lie in 1..576 (the image tokens of pocket)",
    ]
