"""What a check found: steps with their status, and everything that a report shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from runtime.bundle import Bundle
from runtime.check.parity import AnswerParity, GraphParity
from runtime.devices.findings import GraphLatency, TimedAnswers, Twin

Status = Literal["passed", "failed", "not checked"]


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a verdict is made of."""


class Step(_Record, frozen=True):
    """One thing that was looked at. `remedy` says how to get a "not checked" checked."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


class GraphPlacement(_Record, frozen=True):
    """Who ran what inside one graph here; where it was not `executed`, who would is not known."""

    graph: str
    delegates: dict[str, int]
    outside: dict[str, int]
    source: str
    executed: bool = True


class Verdict(_Record, frozen=True):
    """Everything a check found.

    Of a bundle with several keeps it holds what was found at each, named by the keep, and `keeps` the verdict on each
    by itself, by its number of tokens; `answer` and `answers` are those of the first.
    """

    bundle: str
    device: str
    steps: tuple[Step, ...]
    graphs: tuple[GraphParity, ...] = ()
    answer: AnswerParity | None = None
    placements: tuple[GraphPlacement, ...] = ()
    latency: tuple[GraphLatency, ...] = ()
    answers: TimedAnswers | None = None
    twin: Twin | None = None
    keeps: dict[int, Verdict] = {}

    @property
    def outcome(self) -> Status:
        """The worst that happened in any step: `failed`, `not checked` or `passed`."""
        if self.failed_steps:
            return "failed"
        return "not checked" if self.unchecked_steps else "passed"

    @property
    def passed(self) -> bool:
        """True when nothing failed; steps that were not checked do not count, so `outcome` says more."""
        return not self.failed_steps

    @property
    def executed(self) -> bool:
        """False where graphs were evaluated instead of run: then nothing was timed either."""
        return all(placement.executed for placement in self.placements)

    @property
    def failed_steps(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.status == "failed")

    @property
    def unchecked_steps(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.status == "not checked")


def together(bundle: Bundle, verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict on a bundle from those on its keeps, in the order of `bundle.keeps`; the only one as it is."""
    if len(verdicts) == 1:
        return verdicts[0]
    keeps = dict(zip(bundle.keeps, verdicts, strict=True))
    first = verdicts[0]
    change = msgspec.structs.replace
    return change(
        first,
        steps=tuple(
            change(step, name=f"{step.name}, keep {keep}") for keep, verdict in keeps.items() for step in verdict.steps
        ),
        graphs=tuple(
            change(graph, graph=f"{graph.graph}, keep {keep}")
            for keep, verdict in keeps.items()
            for graph in verdict.graphs
        ),
        placements=tuple(
            change(placed, graph=f"{placed.graph}, keep {keep}")
            for keep, verdict in keeps.items()
            for placed in verdict.placements
        ),
        latency=tuple(
            change(timed, graph=f"{timed.graph}, keep {keep}")
            for keep, verdict in keeps.items()
            for timed in verdict.latency
        ),
        keeps=keeps,
    )
