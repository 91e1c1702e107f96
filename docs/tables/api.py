"""The public names of the package, each from where it lives."""

from __future__ import annotations

import ast
from pathlib import Path

import pruneport
from docs.tables.markdown import table as markdown_table

ROOT = Path(__file__).resolve().parent.parent.parent


def homes() -> dict[str, str]:
    """Returns the module of each public name, as a checkout calls it."""
    found = {"Exported": "pruneport", "export_bundle": "pruneport"}
    for home, names in pruneport._HOMES.items():
        for name in names:
            found[name] = _module_of(home, name)
    return found


def _module_of(home: str, name: str) -> str:
    """The module that defines a name which a package only hands on."""
    package = ROOT.joinpath(*home.split("."), "__init__.py")
    if not package.is_file():
        return home
    for node in ast.walk(ast.parse(package.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return f"{node.module}"
    return home


def _node(module: str, name: str) -> ast.AST:
    """The definition of a name; the module itself where the name is one."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    return ast.parse((ROOT.joinpath(*module.split(".")) / f"{name}.py").read_text(encoding="utf-8"))


def path_of(name: str) -> str:
    """Returns the dotted path of a public name."""
    return f"{homes()[name]}.{name}"


def _summary(name: str) -> str:
    node = _node(homes()[name], name)
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.Module)
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def names() -> str:
    """Returns every public name with the first sentence about it, leading to the rest."""
    rows = [("`__version__`", "The version, a text.")]
    rows += [(f"[`{name}`](#{path_of(name)})", _summary(name)) for name in homes()]
    return markdown_table(("name", "is"), rows)


def reference() -> str:
    """Returns what the documentation tool makes of each name's docstrings and signatures."""
    return "\n".join(
        f"::: {path_of(name)}\n    options:\n      heading: pruneport.{name}\n"
        + ("      show_if_no_docstring: true\n" if _is_record(name) else "")
        for name in homes()
    )


def _is_record(name: str) -> bool:
    """True for a class whose fields alone say what it holds: the tool knows no constructor of these."""
    node = _node(homes()[name], name)
    return isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "_Record" for base in node.bases)
