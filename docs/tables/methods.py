"""The pruning methods, read from their sources: whoever builds the pages has no torch."""

from __future__ import annotations

import ast
from pathlib import Path

from docs.tables.markdown import table as markdown_table

ROOT = Path(__file__).resolve().parent.parent.parent


def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT.joinpath(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8"))


def named() -> dict[str, ast.ClassDef]:
    """Returns the class of each method, by the name that requests give it. LookupError for one that is not found."""
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
        found[str(key.value)] = _class_of(_tree(homes[value.id]), value.id)
    return found


def _class_of(tree: ast.Module, value: str) -> ast.ClassDef:
    """The class that `value` is made of, as in `UNIFORM = Uniform()`."""
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        made = node.value.func if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) else None
        if isinstance(made, ast.Name) and isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == value:
            return classes[made.id]
    raise LookupError(f"{value} is not made by calling a class")


def table() -> str:
    """Returns the methods that `--method` can name."""
    rows = [(f"`{name}`", " ".join((ast.get_docstring(node) or "").split())) for name, node in named().items()]
    return markdown_table(("`--method`", "does"), rows)
