"""The version, and the entry point that finds the rooms `export`, `pruning` and `runtime`."""

import sys
from collections.abc import Sequence
from pathlib import Path

__version__ = "0.1.0"


def main(argv: Sequence[str] | None = None, *, optimum: bool = False) -> int:
    """Runs the command line (with `optimum`, that of `optimum-cli export pruneport`) and returns its exit code.

    The rooms import each other by their short names. In a checkout they lie beside this package, in an
    installed wheel inside it; either way their folder has to be on `sys.path` before the first of them loads.
    """
    here = Path(__file__).resolve().parent
    rooms = here if (here / "export").is_dir() else here.parent
    if str(rooms) not in sys.path:
        sys.path.insert(0, str(rooms))
    from export.cli import main as cli_main

    return cli_main(sys.argv[1:] if argv is None else argv, version=__version__, optimum=optimum)
