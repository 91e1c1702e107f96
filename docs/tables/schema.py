"""The specification of a bundle's manifest, from the structs that read and write it."""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from docs.tables.markdown import code
from docs.tables.markdown import table as markdown_table
from runtime import bundle
from runtime.bundle import SCHEMA_VERSION, Manifest


def structs() -> list[type[msgspec.Struct]]:
    """Returns every struct that a manifest can hold, each behind the one that names it first."""
    found: list[type[msgspec.Struct]] = [Manifest]
    for struct in found:
        for hint in get_type_hints(struct, include_extras=True).values():
            found.extend(inner for inner in _inner(hint) if inner not in found)
    return found


def _inner(hint: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        yield hint
    for argument in get_args(hint):
        if not isinstance(argument, str | int):
            yield from _inner(argument)


def _spelled(hint: Any) -> str:
    """A type in the words of JSON."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _spelled(arguments[0]) + _limits(arguments[1:])
    if origin is Literal:
        return " or ".join(f"`{json.dumps(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_spelled(argument) for argument in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_spelled(arguments[0])}"
        return f"list of {len(arguments)}: {', '.join(dict.fromkeys(map(_spelled, arguments)))}"
    if origin is dict:
        return f"object, each value {_spelled(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return f"[{hint.__name__}](#{hint.__name__.lower()})"
    return {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null"}.get(
        hint, f"`{hint}`"
    )


def _limits(metas: tuple[Any, ...]) -> str:
    words = []
    for meta in metas:
        low, high = meta.ge, meta.le
        if low is not None and high is not None:
            words.append(f"{low} to {_large(high)}")
        elif low is not None:
            words.append(f"at least {low:g}")
        if meta.gt is not None:
            words.append(f"above {meta.gt:g}")
        if meta.min_length is not None or meta.max_length is not None:
            words.append(f"{meta.min_length or 0} to {meta.max_length} long")
    return f" ({', '.join(words)})" if words else ""


def _large(number: float) -> str:
    return {2**31 - 1: "2^31 - 1", 2**53: "2^53"}.get(int(number), f"{number:g}")


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"`{json.dumps(msgspec.to_builtins(value))}`"


def page() -> str:
    """Returns each struct with its docstring and its fields."""
    parts = [f"The schema has version {SCHEMA_VERSION}. A tensor's `dtype` is one of {code(bundle.DTYPES)}.\n"]
    for struct in structs():
        hints = get_type_hints(struct, include_extras=True)
        rows = [
            (f"`{field.encode_name}`", _spelled(hints[field.name]), _default(field))
            for field in msgspec.structs.fields(struct)
        ]
        parts.append(
            f"### {struct.__name__}\n\n{inspect.getdoc(struct)}\n\n"
            + markdown_table(("field", "type", "default"), rows)
        )
    return "\n".join(parts)
