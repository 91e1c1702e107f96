"""What can go wrong, from every place in the code where a PruneportError is made."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime import errors
from runtime.errors import PruneportError

ROOT = Path(__file__).resolve().parent.parent.parent
ROOMS = ("pruneport", "export", "pruning", "runtime", "optimum")
# What a name stands for is in the name where it is a plain one; a longer expression is left out.
GAP = "…"


@dataclass(frozen=True, order=True)
class Message:
    """The text of one error as the code makes it, values left open, and the module that makes it."""

    text: str
    module: str

    @property
    def what(self) -> str:
        """The text up to the last semicolon: what is wrong, what is allowed."""
        return self.text.rpartition("; ")[0] or self.text

    @property
    def next_step(self) -> str:
        """What stands behind the last semicolon: what to do."""
        before, _, after = self.text.rpartition("; ")
        return after if before else ""


def classes() -> dict[str, type[PruneportError]]:
    """Returns the tree of errors, the base first, by name."""
    return {
        name: value
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, PruneportError)
    }


def messages() -> dict[str, list[Message]]:
    """Returns the texts of each class, as the sources of all rooms spell them."""
    found: dict[str, set[Message]] = {name: set() for name in classes()}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for name, text in _made(ast.parse(path.read_text(encoding="utf-8"))):
                if name in found:
                    found[name].add(Message(text, module))
    return {name: sorted(texts) for name, texts in found.items()}


def _made(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each call of a class that is called something with Error and gets a text, with that text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
            text = _text(node.args[0]) if node.args else ""
            if re.search(r"[A-Za-z]{3}", re.sub(r"«[^»]*»", "", text)):  # more than values handed on
                yield node.func.id, text


def _text(node: ast.expr) -> str:
    """What an expression spells, with «names» where it is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) for value in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.FormattedValue):
        return _value(node.value)
    return _value(node)


def _value(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return f"«{node.id.strip('_').replace('_', ' ')}»"
    if isinstance(node, ast.Attribute):
        return f"«{node.attr.strip('_').replace('_', ' ')}»"
    return GAP


def page() -> str:
    """Returns each class of errors with its texts, and what to do next."""
    texts = messages()
    parts = []
    for name, kind in classes().items():
        if not texts[name]:
            continue
        above = kind.__mro__[1].__name__
        parts.append(f"## {name}\n\n{_sentence(kind)} Ends with exit code {kind.exit_code}.")
        parts.append(f" It is a kind of `{above}`.\n\n" if above != "PruneportError" else "\n\n")
        for message in texts[name]:
            parts.append(f"- {_shown(message.what)}\n")
            if message.next_step:
                parts.append(f"    - **Next:** {_shown(message.next_step)}\n")
        parts.append("\n")
    return "".join(parts)


def _sentence(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


# What Markdown or HTML would read as something else.
_MARKS = re.compile(r"[\\`*_{}\[\]<>&#|~]")


def _shown(text: str) -> str:
    """The text as it is, what is filled in leaning."""
    plain = _MARKS.sub(lambda found: f"&#{ord(found[0])};", " ".join(text.split()))
    return re.sub("«([^»]*)»", r"<var>\1</var>", plain)
