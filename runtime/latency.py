"""How long a graph takes in its engine on this machine; never a statement about a phone."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from runtime.generation import Answers
from runtime.session import Session

# A graph that takes seconds needs fewer runs: after this long, and at least so many runs, a measurement ends.
BUDGET_MS = 60_000.0
LEAST_RUNS = 3


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What latency.json is made of."""


class Latency(_Record, frozen=True):
    """One graph's times over `runs` runs, in milliseconds.

    `peak_rss_bytes` is the highest resident memory of the whole process during the runs, so it holds the interpreter
    and everything else that is loaded, too.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    min_ms: float
    max_ms: float
    runs: int
    threads: int
    device: str
    engine: str
    load_ms: float
    peak_rss_bytes: int

    @classmethod
    def of(
        cls, times_ms: Sequence[float], *, threads: int, device: str, engine: str, load_ms: float, peak_rss_bytes: int
    ) -> Self:
        """What measured times come to."""
        p10, median, p90 = (float(value) for value in np.percentile(times_ms, (10, 50, 90)))
        return cls(
            median_ms=median,
            p10_ms=p10,
            p90_ms=p90,
            min_ms=min(times_ms),
            max_ms=max(times_ms),
            runs=len(times_ms),
            threads=threads,
            device=device,
            engine=engine,
            load_ms=load_ms,
            peak_rss_bytes=peak_rss_bytes,
        )


class Ratio(_Record, frozen=True):
    """Pruned time over twin time, from neighbouring runs; above 1 the pruned graph is slower."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, ratios: Sequence[float] | np.ndarray) -> Self:
        """The spread of the ratios of neighbouring runs."""
        p10, median, p90 = (float(value) for value in np.percentile(ratios, (10, 50, 90)))
        return cls(median=median, p10=p10, p90=p90)


class Spread(_Record, frozen=True):
    """Milliseconds over several runs."""

    median_ms: float
    p10_ms: float
    p90_ms: float

    @classmethod
    def of(cls, times_ms: list[float]) -> Self:
        """The spread of measured times."""
        p10, median, p90 = (float(value) for value in np.percentile(times_ms, (10, 50, 90)))
        return cls(median_ms=median, p10_ms=p10, p90_ms=p90)


class AnswerLatency(_Record, frozen=True):
    """Whole answers over `runs` runs.

    image_ready   pixel values to the image's whole KV cache, before any question
    ttft          question (token ids) to first token, the image being ready
    token         one further token
    kv_cache_bytes   the whole KV cache, image and text, filled or not
    """

    image_ready: Spread
    ttft: Spread
    token: Spread
    question_tokens: int
    new_tokens: int
    kv_cache_bytes: int
    runs: int
    threads: int
    device: str
    engine: str


class AnswerRatio(_Record, frozen=True):
    """Pruned over twin, from neighbouring runs; below 1 the pruned bundle is faster."""

    image_ready: Ratio
    ttft: Ratio
    token: Ratio


class PairLatency(_Record, frozen=True):
    """A bundle's graph and its unpruned twin's, measured in turns."""

    bundle: Latency
    twin: Latency
    ratio: Ratio


def device_name() -> str:
    """This machine in words, e.g. `desktop CPU (AMD EPYC 7B13, 2 cores)`."""
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"desktop CPU ({name}, {os.cpu_count()} cores)"


def measure(session: Session, inputs: Mapping[str, np.ndarray], *, warmup: int = 2, runs: int = 10) -> Latency:
    """Times `runs` runs after `warmup` untimed ones; fewer, but at least three, where they take over a minute."""
    _check_counts(warmup=warmup, runs=runs)
    for _ in range(warmup):
        if _time_ms(session, inputs) > BUDGET_MS / LEAST_RUNS:
            break
    restart_peak_rss()
    times_ms: list[float] = []
    while _more(times_ms, runs):
        times_ms.append(_time_ms(session, inputs))
    return _latency(session, times_ms, peak_rss_bytes())


def measure_pair(
    session: Session,
    inputs: Mapping[str, np.ndarray],
    twin: Session,
    twin_inputs: Mapping[str, np.ndarray],
    *,
    warmup: int = 2,
    runs: int = 10,
) -> PairLatency:
    """Times a graph and its twin in turns, swapping the order, so that drift of the machine hits both alike.

    Where `runs` turns take over a minute, fewer are made, but at least two.
    """
    _check_counts(warmup=warmup, runs=runs)
    for _ in range(warmup):
        if _time_ms(session, inputs) + _time_ms(twin, twin_inputs) > BUDGET_MS / LEAST_RUNS:
            break
    restart_peak_rss()
    times_ms: list[float] = []
    twin_times_ms: list[float] = []
    while _more([*times_ms, *twin_times_ms], 2 * runs):
        if len(times_ms) % 2:
            twin_times_ms.append(_time_ms(twin, twin_inputs))
            times_ms.append(_time_ms(session, inputs))
        else:
            times_ms.append(_time_ms(session, inputs))
            twin_times_ms.append(_time_ms(twin, twin_inputs))
    peak = peak_rss_bytes()
    return PairLatency(
        bundle=_latency(session, times_ms, peak),
        twin=_latency(twin, twin_times_ms, peak),
        ratio=Ratio.of(np.asarray(times_ms) / np.asarray(twin_times_ms)),
    )


def _more(times_ms: list[float], runs: int) -> bool:
    """Whether another run is wanted after these."""
    return len(times_ms) < runs and (len(times_ms) < LEAST_RUNS or sum(times_ms) < BUDGET_MS)


def _check_counts(*, warmup: int, runs: int) -> None:
    if warmup < 0 or runs < 1:
        raise ValueError(f"warmup={warmup} must be at least 0 and runs={runs} at least 1")


class AnswerTimer:
    """Measures answers of one bundle, one run at a time, so that two bundles can take turns."""

    def __init__(self, answers: Answers, pixel_values: np.ndarray, question: Sequence[int], *, new_tokens: int) -> None:
        self._answers, self._pixels, self._question = answers, pixel_values, list(question)
        self._new_tokens = new_tokens
        self._ready_ms: list[float] = []
        self._first_ms: list[float] = []
        self._token_ms: list[float] = []

    @property
    def total_ms(self) -> float:
        """All time measured so far."""
        return sum(self._ready_ms) + sum(self._first_ms) + sum(self._token_ms)

    def run(self) -> None:
        """Sees the photo, asks the question, takes all tokens."""
        photo = self._answers.see(self._pixels)
        first, *rest = self._answers.answer(photo, self._question, max_new_tokens=self._new_tokens, past_end=True)
        self._ready_ms.append(photo.image_ready_ms)
        self._first_ms.append(first.ms)
        self._token_ms += [token.ms for token in rest]

    def forget(self) -> None:
        """Drops what was measured: it was the warm-up."""
        self._ready_ms.clear()
        self._first_ms.clear()
        self._token_ms.clear()

    def latency(self, *, threads: int, engine: str) -> AnswerLatency:
        """What was measured."""
        return AnswerLatency(
            image_ready=Spread.of(self._ready_ms),
            ttft=Spread.of(self._first_ms),
            token=Spread.of(self._token_ms),
            question_tokens=len(self._question),
            new_tokens=self._new_tokens,
            kv_cache_bytes=self._answers.cache_bytes,
            runs=len(self._ready_ms),
            threads=threads,
            device=device_name(),
            engine=engine,
        )

    def ratio(self, twin: AnswerTimer) -> AnswerRatio:
        """Medians of this over the twin's, from runs in turns."""
        ready = np.asarray(self._ready_ms) / np.asarray(twin._ready_ms)
        first = np.asarray(self._first_ms) / np.asarray(twin._first_ms)
        return AnswerRatio(
            image_ready=Ratio.of(ready),
            ttft=Ratio.of(first),
            token=Ratio.of(np.asarray(self._token_ms) / np.asarray(twin._token_ms)),
        )


def measure_answers(timers: Sequence[AnswerTimer], *, warmup: int = 1, runs: int = 5) -> None:
    """Runs all timers in turns, swapping the order; fewer times where that takes over a minute, but at least twice."""
    _check_counts(warmup=warmup, runs=runs)
    for _ in range(warmup):
        for timer in timers:
            timer.run()
    for timer in timers:
        timer.forget()
    for run in range(runs):
        for timer in timers if run % 2 == 0 else reversed(timers):
            timer.run()
        if run and sum(timer.total_ms for timer in timers) > BUDGET_MS:
            break


def _time_ms(session: Session, inputs: Mapping[str, np.ndarray]) -> float:
    start = time.perf_counter()
    session.run(inputs)
    return (time.perf_counter() - start) * 1e3


def _latency(session: Session, times_ms: list[float], peak: int) -> Latency:
    return Latency.of(
        times_ms,
        threads=session.threads,
        device=device_name(),
        engine=session.engine,
        load_ms=session.load_ms,
        peak_rss_bytes=peak,
    )


def restart_peak_rss() -> None:
    """Restarts the kernel's high-water mark; where that is not allowed, the mark covers the whole process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far, or since the mark was last restarted."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
