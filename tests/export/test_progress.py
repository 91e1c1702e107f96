"""How far a stage is, and how long the rest of it takes."""

from __future__ import annotations

import io

import pytest

from export import progress
from export.progress import Progress


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_long_stage_says_now_and_then_what_is_left(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stages=2, stream=stream).stage("trace and lower") as stage:
        stage.expect(200)
        for _ in range(14):
            clock.now += 9.0
            stage.advance(10)
    lines = stream.getvalue().splitlines()
    # After 63 s 7 of 20 parts are done, and 13 more at 9 s each are left; after 126 s 6 are.
    assert lines[:2] == [
        "[1/2] trace and lower: 35%, about 1 min 57 s left",
        "[1/2] trace and lower: 70%, about 54 s left",
    ]
    assert len(lines) == 3


@pytest.mark.parametrize("total", [0, 10])
def test_without_a_rate_nothing_is_said(clock: Clock, total: int) -> None:
    """Of work that nobody counted, and of more than was expected."""
    stream = io.StringIO()
    with Progress(stages=1, stream=stream).stage("trace and lower") as stage:
        stage.expect(total)
        clock.now += 100.0
        stage.advance(10)
        stage.advance(10)
    assert len(stream.getvalue().splitlines()) == 1


def test_a_quiet_export_says_nothing(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(stages=1, quiet=True, stream=stream).stage("trace and lower") as stage:
        stage.expect(10)
        clock.now += 100.0
        stage.advance(5)
    assert stream.getvalue() == ""
