"""What the process of a cell runs: `pruneport`, ended when the sweep that started it is gone.

Started by its path with the folder that pruneport lies in, then the command line. Standard input is a pipe that the
sweep holds open: it ends with the sweep, even if that is killed.
"""

from __future__ import annotations

import importlib
import os
import runpy
import signal
import sys
import threading
import time

# So long an export may take to remove what it has begun.
GRACE_S = 10


def _leave_with_parent() -> None:
    os.read(0, 1)  # nothing is ever written; this returns when the other end is closed
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    folder = sys.argv.pop(1)
    sys.path.insert(0, folder)
    importlib.import_module("pruneport")
    sys.path.remove(folder)  # what else lies beside pruneport is not asked for
    runpy.run_module("pruneport", run_name="__main__", alter_sys=True)
