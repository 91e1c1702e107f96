"""Names of files, and other text from outside, as every stream, report and file can hold it."""

from __future__ import annotations

from pathlib import Path

LONGEST_NAME = 256  # in a manifest


def stored_name(path: Path) -> str:
    """Spells the last part of a path as a manifest can hold it."""
    return readable(path.name)[:LONGEST_NAME]


def readable(name: str | Path) -> str:
    """Spells a name so that it can be stored and printed on one line: what is no character becomes `\\xNN`."""
    return "".join(f"\\x{ord(letter):02x}" if _is_control(letter) else letter for letter in spelt(str(name)))


def spelt(text: str) -> str:
    """Spells what Python could not decode, and holds as lone surrogates: bytes as `\\xNN`, others as `\\uNNNN`."""
    if is_text(text):
        return text
    return "".join(_spelling(letter) if "\ud800" <= letter <= "\udfff" else letter for letter in text)


def is_text(text: str | Path) -> bool:
    """Returns False where bytes are in it that are no UTF-8: libraries that are not written in Python refuse those."""
    try:
        str(text).encode()
    except UnicodeEncodeError:
        return False
    return True


def _spelling(surrogate: str) -> str:
    byte = ord(surrogate) - 0xDC00
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else f"\\u{ord(surrogate):04x}"


def _is_control(letter: str) -> bool:
    return ord(letter) < 0x20 or 0x7F <= ord(letter) < 0xA0 or letter in "\u2028\u2029"


def plural(count: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
