"""Memory of this process that nobody needs any more."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Has the C library return what was freed: glibc keeps it, hundreds of megabytes after a large graph."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
