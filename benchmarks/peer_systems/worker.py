"""What a worker of benchmarks/peers.py says and is told: a line of standard input, a line of JSON for an answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

# What stands before the path in the line that asks for numbers to compare, and the line that asks for a measurement.
CHECK, RUN = "check ", "run"


class Peer(Protocol):
    """One system with everything loaded and the prompt's prefix in its cache."""

    def check(self) -> tuple[str, np.ndarray]:
        """What it makes of the photo: what that is, and the numbers."""

    def run(self) -> Mapping[str, Any]:
        """Photo, question and further tokens, once: `image_ready_ms`, `ttft_question_ms`, `token_ms` of each token."""


def serve(peer: Peer, versions: Mapping[str, str]) -> None:
    """Answers lines until there are no more."""
    import numpy as np

    _say({"ready": True, "versions": dict(versions)})
    for line in sys.stdin:
        if line.startswith(CHECK):
            compared, numbers = peer.check()
            np.ascontiguousarray(numbers, np.float32).tofile(Path(line.removeprefix(CHECK).strip()))
            _say({"compared": compared})
        else:
            _say(peer.run())


def _say(answer: Mapping[str, Any]) -> None:
    print(json.dumps(answer), flush=True)
