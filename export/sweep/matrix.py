"""Reads a matrix of flags: each flag with a word or a list of words, and the cells are their product."""

from __future__ import annotations

import itertools
import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from export.request import Request, nearest
from runtime.errors import ExportError, RequestError
from runtime.names import readable

# Of one cell, by flag, in the order of the file: `keep` -> `64`.
Words = dict[str, str]

# A cell is an export of minutes; more than this is a mistake in the matrix.
MOST_CELLS = 500
# Far more than so many cells take.
MOST_BYTES = 2**20

# The flags of an export, but for the folder, which is the sweep's own.
FLAGS = {field.name.replace("_", "-"): field for field in fields(Request) if field.name != "output_dir"}
SWITCHES = tuple(flag for flag, field in FLAGS.items() if isinstance(field.default, bool))
_NEEDED = tuple(flag for flag, field in FLAGS.items() if field.default is MISSING and flag != "target")


def read_matrix(path: Path) -> tuple[Words, ...]:
    """Returns the cells of a matrix: a YAML mapping from flags to a word or a list of words, or a list of mappings.

    Words are what stands there, letter for letter: nothing is read as a number or as a date. What a word means is for
    `export.request.plan` to say. The last flag of a mapping varies fastest.

    Raises RequestError for a file that is no such thing, that makes a cell twice, or more than MOST_CELLS of them,
    ExportError where PyYAML is not installed.
    """
    where = readable(path)
    root = _root(path, where)
    parts = root.value if root is not None and root.id == "sequence" else [root]
    if not parts or root is None:
        raise RequestError(f"{where} is empty; write lines such as `keep: [64, 128]`")
    columns = [_columns(part, where) for part in parts]
    count = sum(math.prod(map(len, part.values())) for part in columns)
    if count > MOST_CELLS:
        raise RequestError(f"{where} makes {count} cells, at most {MOST_CELLS} are run; split it")
    cells = [dict(zip(part, words, strict=True)) for part in columns for words in itertools.product(*part.values())]
    seen: dict[frozenset[tuple[str, str]], int] = {}
    for number, cell in enumerate(cells, 1):
        if (first := seen.setdefault(frozenset(cell.items()), number)) != number:
            raise RequestError(
                f"{where} makes a cell twice, {spelt_out(cell)} (cells {first} and {number}); name it once"
            )
    return tuple(cells)


def spelt_out(words: Words) -> str:
    """`model=pocket keep=64`."""
    return " ".join(f"{flag}={readable(word)}" for flag, word in words.items())


def as_request(words: Words, output_dir: Path) -> Request:
    """The export that the words ask for."""
    from export.targets import TARGETS

    chosen: dict[str, Any] = {"target": next(iter(TARGETS))}
    for flag, word in words.items():
        chosen[FLAGS[flag].name] = word == "true" if flag in SWITCHES else word
    return Request(**chosen, output_dir=str(output_dir))


def as_flags(words: Words) -> tuple[str, ...]:
    """The words as `pruneport export` takes them: `--keep=64`, which holds for words that begin with a dash, too."""
    flags = []
    for flag, word in words.items():
        if flag not in SWITCHES:
            flags.append(f"--{flag}={word}")
        elif word == "true":
            flags.append(f"--{flag}")
    return tuple(flags)


def _root(path: Path, where: str) -> Any:
    """The root of the YAML's nodes, None for an empty file. Scalars of nodes are text, as it stands there."""
    try:
        import yaml
    except ImportError as error:
        raise ExportError(
            "PyYAML, which reads a matrix, is not installed here; run: pip install 'pruneport[export]'"
        ) from error
    form = "write lines such as `keep: [64, 128]`"
    try:
        if path.stat().st_size > MOST_BYTES:
            raise RequestError(f"{where} has more than {MOST_BYTES} bytes, which no matrix has; split it")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{where} cannot be read: {error.strerror}; give a YAML file of flags") from error
    except ValueError as error:
        raise RequestError(f"{where} is no text in UTF-8; give a YAML file of flags") from error
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise RequestError(f"{where} is no YAML: {error.problem}{at}; {form}") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{where} is no YAML: {readable(str(error).splitlines()[0])}; {form}") from error
    except RecursionError as error:
        raise RequestError(f"{where} is nested too deeply; {form}") from error


def _columns(part: Any, where: str) -> dict[str, list[str]]:
    """The words of each flag of one mapping."""
    if part.id != "mapping":
        raise RequestError(f"{_at(part, where)} is a {part.id}, not a mapping; write lines such as `keep: [64, 128]`")
    columns: dict[str, list[str]] = {}
    for key, value in part.value:
        here, flag = _at(key, where), key.value
        if key.id != "scalar" or flag not in FLAGS:
            name = readable(flag) if key.id == "scalar" else f"a {key.id}"
            raise RequestError(f"{here}: unknown key {name!r}{nearest(name, FLAGS)}; allowed: {', '.join(FLAGS)}")
        if flag in columns:
            raise RequestError(f"{here} names {flag} a second time; name it once, with a list of words")
        nodes = value.value if value.id == "sequence" else [value]
        if not nodes:
            raise RequestError(f"{here}: {flag} is an empty list, which makes no cell; give it a word, or leave it out")
        for node in nodes:
            if node.id != "scalar":
                raise RequestError(f"{here}: {flag} holds a {node.id}; it takes a word or a list of words")
            if not node.value or "\0" in node.value:
                raise RequestError(f"{here}: {flag} has no word; give it one, or leave {flag} out")
            if flag in SWITCHES and node.value not in ("true", "false"):
                raise RequestError(f"{here}: {flag}={readable(node.value)!r} must be true or false")
        columns[flag] = [node.value for node in nodes]
    missing = [flag for flag in _NEEDED if flag not in columns]
    if missing:
        raise RequestError(f"{_at(part, where)} has no {missing[0]}; every cell needs {' and '.join(_NEEDED)}")
    return columns


def _at(node: Any, where: str) -> str:
    return f"{where}, line {node.start_mark.line + 1}"
