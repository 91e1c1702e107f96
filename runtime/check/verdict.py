"""What a check found: steps with their status, and everything that a report shows."""

from __future__ import annotations

from typing import Literal

import msgspec

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
    """Everything a check found."""

    bundle: str
    device: str
    steps: tuple[Step, ...]
    graphs: tuple[GraphParity, ...] = ()
    answer: AnswerParity | None = None
    placements: tuple[GraphPlacement, ...] = ()
    latency: tuple[GraphLatency, ...] = ()
    answers: TimedAnswers | None = None
    twin: Twin | None = None

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
