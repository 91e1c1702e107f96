"""The process of one bundle. Started by its path, because there pruneport need not be installed: see `answering`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # In a checkout the rooms lie beside the package, in a wheel inside it.
    rooms = Path(__file__).resolve().parents[2]
    folder = str(rooms if (rooms / "pruneport").is_dir() else rooms.parent)
    sys.path.insert(0, folder)
    importlib.import_module("pruneport")
    sys.path.remove(folder)  # what else lies beside pruneport is not asked for
    importlib.import_module("pruneport.runtime.serve.answering").main(sys.argv[1:])
