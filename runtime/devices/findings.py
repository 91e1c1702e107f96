"""What a device is asked to do with a bundle, and what it tells; `runtime.check` says whether that is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import msgspec
import numpy as np

from runtime.bundle import VISION_ENCODER, Bundle
from runtime.latency import AnswerLatency, AnswerRatio, Latency, Ratio
from runtime.placement import Placement


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What latency.json is made of."""


class GraphLatency(_Record, frozen=True):
    """One graph's times at a step, and its twin's from the same minutes; `ratio` is pruned over twin."""

    graph: str
    bundle: Latency
    twin: Latency | None = None
    ratio: Ratio | None = None


class TimedAnswers(_Record, frozen=True):
    """Whole answers, and the twin's from the same minutes."""

    bundle: AnswerLatency
    twin: AnswerLatency | None = None
    ratio: AnswerRatio | None = None


class Twin(_Record, frozen=True):
    """What the report says about the unpruned twin, besides its times; sizes in bytes."""

    name: str
    image_tokens: int
    size_bytes: int
    handed_on_bytes: int

    @classmethod
    def of(cls, twin: Bundle) -> Self:
        """What a bundle says of itself as a twin."""
        handed_on = next((graph for graph in twin.manifest.graphs if graph.name == VISION_ENCODER), None)
        return cls(
            name=twin.manifest.name,
            image_tokens=twin.manifest.prune.keep,
            size_bytes=twin.size_bytes,
            handed_on_bytes=sum(info.size_bytes for info in handed_on.outputs) if handed_on else 0,
        )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How to time: runs before and while it is measured, and the unpruned twin to time in turns with."""

    warmup: int = 2
    runs: int = 10
    twin: Bundle | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run: the golden's inputs through every graph, its question, and with `timing` how long that takes.

    `threads` None means the cores of the machine, at most 4.
    """

    threads: int | None = None
    timing: Timing | None = None


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """Why something was not run: what it needs is `missing` here, or an engine refused."""

    message: str
    missing: bool = False


@dataclass(frozen=True, kw_only=True)
class GraphFinding:
    """What came of one graph at one step, "" where the golden knows none for it.

    `outputs` and `states`, as they are after the run, are None where it was not run. `placement` is None where neither
    the engine nor the file itself told who runs what. `twin_trouble` says why its twin was not timed.
    """

    graph: str
    step: str
    engine: str = ""
    outputs: Mapping[str, np.ndarray] | None = None
    states: Mapping[str, np.ndarray] = field(default_factory=dict)
    placement: Placement | None = None
    latency: GraphLatency | None = None
    trouble: Trouble | None = None
    twin_trouble: Trouble | None = None

    @property
    def opened(self) -> bool:
        """False where no engine could open the graph: then the file alone told who would run it."""
        return self.trouble is None or not self.trouble.missing


@dataclass(frozen=True, kw_only=True)
class AnswerFinding:
    """What came of the golden's question: ids of the answer, None without a golden answer, and bytes of the cache."""

    ids: np.ndarray | None = None
    cache_bytes: int | None = None
    times: TimedAnswers | None = None
    trouble: Trouble | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Everything that a device tells about a job.

    `pixel_values` is what it makes of the golden's photo, None without one; `photo_refused` why it could not.
    """

    device: str
    pixel_values: np.ndarray | None
    photo_refused: str = ""
    graphs: tuple[GraphFinding, ...]
    answer: AnswerFinding | None = None
    twin: Twin | None = None
