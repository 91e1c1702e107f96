"""Who runs what inside a loaded graph, as its engine or its file tells."""

from __future__ import annotations

from dataclasses import dataclass, field


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
