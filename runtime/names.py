"""Names of files as text that every stream, report and file can hold, whatever bytes they are made of."""

from __future__ import annotations

import os
from pathlib import Path


def readable(name: str | Path) -> str:
    """Spells a name so that it can be printed and stored: bytes that are no UTF-8, and controls, become `\\xNN`."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(f"\\x{ord(letter):02x}" if _is_control(letter) else letter for letter in text)


def is_utf8(name: str | Path) -> bool:
    """Returns False for a name with bytes that are no UTF-8, which Python holds as lone surrogates."""
    try:
        str(name).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_control(letter: str) -> bool:
    return ord(letter) < 0x20 or 0x7F <= ord(letter) < 0xA0
