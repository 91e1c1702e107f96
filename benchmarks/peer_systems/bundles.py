"""pruneport's bundles for benchmarks/peers.py, made by the command line as anybody makes them.

bundles.py LAYERS FLAG ...     # the flags of `pruneport export`, without --model and --weights
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_systems import model


def main(words: Sequence[str]) -> int:
    """Exports the model of that depth with seeded weights; the exit code of `pruneport export`."""
    import pruneport

    layers, *flags = words
    name = model.register(int(layers))
    command = ("export", "--model", name, "--weights", "random", "--seed", str(model.SEED))
    return pruneport.main((*command, *flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
