"""What an engine gives back once it holds a graph: a way to run it and an account of who runs what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from runtime.bundle import TensorInfo
from runtime.errors import EngineError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Who runs what inside a loaded graph.

    `delegates`: calls into each accelerator library (empty when the engine has none of its own); `outside`: operators
    that the plain runtime runs, by name and count; `source`: where this was read, because engines differ in what they
    admit. `executed` is False where the graph is only evaluated, so that who would run it, and how fast, is not known.
    `emulated`: a delegate's hardware is only imitated here, so that times say nothing about it. `stand_in`: why the
    plain runtime ran everything in the place of a delegate, where that cannot be otherwise here. `accumulator_bits`: in
    how many bits float16 products are added up, 16 only where that was measured in the engine at hand.
    """

    delegates: dict[str, int] = field(default_factory=dict)
    outside: dict[str, int] = field(default_factory=dict)
    source: str
    executed: bool = True
    emulated: bool = False
    stand_in: str = ""
    accumulator_bits: int = 32


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
