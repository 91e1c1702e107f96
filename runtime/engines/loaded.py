"""What an engine gives back once it holds a graph: a way to run it, and to ask who runs what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from runtime.bundle import TensorInfo
from runtime.errors import EngineError
from runtime.placement import Placement


class LoadedGraph(Protocol):
    """A graph inside an engine; inputs and outputs are in the order of the manifest."""

    engine: str

    @property
    def threads(self) -> int:
        """Threads the engine uses for one run, asked of the engine itself."""
        ...

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Runs the graph once; EngineError when the engine refuses. Behind the inputs come states, written in place."""
        ...

    def placement(self) -> Placement:
        """Who runs what, read from the engine or from the loaded file, never from the manifest."""
        ...

    def close(self) -> None:
        """Lets go of the graph's memory."""
        ...


def check_by_place(
    declared: Sequence[TensorInfo], found: Sequence[tuple[str, tuple[int, ...]]], kind: str, where: str
) -> None:
    """EngineError when tensors without names, (dtype, shape) each, are not what the manifest says in that order."""
    if list(found) != [(info.dtype, info.shape) for info in declared]:
        shown = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in found)
        wanted = ", ".join(map(str, declared))
        raise EngineError(f"{where} has the {kind} {shown}; its manifest says {wanted}; export again")
