"""The pruning methods, read from their sources: whoever builds the pages has no torch."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

from docs.tables.markdown import table as markdown_table

ROOT = Path(__file__).resolve().parent.parent.parent


def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT.joinpath(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8"))


class Described(NamedTuple):
    """What the source says of a method: its docstring's paragraphs, what it looks at, and where it may prune."""

    paragraphs: tuple[str, ...]
    needs: tuple[str, ...]
    cuts: str


def named() -> dict[str, Described]:
    """Describes each method, by the name that requests give it. LookupError for one that is not found."""
    tree = _tree("pruning.methods")
    homes = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    tables = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)]
    if len(tables) != 1:
        raise LookupError(f"pruning/methods.py has {len(tables)} tables of methods, one is wanted")
    found = {}
    for key, value in zip(tables[0].keys, tables[0].values, strict=True):
        assert isinstance(key, ast.Constant)
        assert isinstance(value, ast.Name)
        found[str(key.value)] = _described(_tree(homes[value.id]), value.id)
    return found


def _described(tree: ast.Module, value: str) -> Described:
    """Reads the class that `value` is made of, as in `UNIFORM = Uniform()`, and its base where that says more."""
    values = _assigned(tree.body)
    made = values.get(value)
    name = made.func.id if isinstance(made, ast.Call) and isinstance(made.func, ast.Name) else None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        raise LookupError(f"{value} is not made by calling a class")
    node = classes[name]
    bases = [classes[base.id] for base in node.bases if isinstance(base, ast.Name) and base.id in classes]
    parts = {name: part for one in (*bases, node) for name, part in _assigned(one.body).items()}
    needs = parts["needs"]
    if isinstance(needs, ast.Name):
        needs = values[needs.id]
    words = sorted(str(part.value) for part in ast.walk(needs) if isinstance(part, ast.Constant))
    assert isinstance(parts["cuts"], ast.Call)
    ends = {str(word.arg): ast.literal_eval(word.value) for word in parts["cuts"].keywords}
    paragraphs = (ast.get_docstring(node) or "").split("\n\n")
    return Described(tuple(" ".join(text.split()) for text in paragraphs), tuple(words), _span(**ends))


def _assigned(body: list[ast.stmt]) -> dict[str, ast.expr]:
    """What names of a module or a class are given at once."""
    pairs = [(node.targets[0], node.value) for node in body if isinstance(node, ast.Assign)]
    pairs += [(node.target, node.value) for node in body if isinstance(node, ast.AnnAssign) and node.value]
    return {ast.unparse(target): value for target, value in pairs}


def _span(least: int = 0, most: int | None = None) -> str:
    if most is None:
        return f"{least} or more" if least else "any"
    return str(least) if least == most else f"{least} to {most}"


def table() -> str:
    """Returns what `--method` can name, what each looks at beside the hidden states, and where it may prune."""
    rows = [
        (f"`{name}`", method.paragraphs[0], ", ".join(method.needs) or "nothing", method.cuts)
        for name, method in named().items()
    ]
    return markdown_table(("`--method`", "does", "looks at", "`--cut`"), rows)


def page() -> str:
    """Returns a part for each method with more to say than a line."""
    return "\n\n".join(
        f"### {name}\n\n" + "\n\n".join(method.paragraphs) for name, method in named().items() if method.paragraphs[1:]
    )
