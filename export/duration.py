"""How long an export takes here: from runs that were measured, and how fast this machine is beside theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np


class Speed(NamedTuple):
    """What a machine does in a second: billions of float32 operations of a matrix product, gigabytes copied."""

    products: float
    copies: float


class Measured(NamedTuple):
    """What exports took on a machine of a known speed: `any_model_s` seconds whatever the model, tracing above all,
    and seconds for each billion weights, by what bounds them.
    """

    any_model_s: float
    products: float
    copies: float
    speed: Speed


# Made from benchmarks/results/export_*.json; tests/export/test_duration.py makes them again.
MEASURED = {
    "onnx": Measured(28.0, 66.74, 25.59, Speed(217.1, 32.9)),
    "xnnpack": Measured(57.0, 36.66, 109.7, Speed(218.4, 40.0)),
}
# Without quantisation whole models were not measured; below so many weights only what any model takes counts.
_FEW_WEIGHTS = 10**8


def forecast_seconds(backend: str, weights: int, *, quantised: bool, bundles: int) -> float | None:
    """Seconds that an export of whole bundles takes on this machine while it does nothing else.

    `weights` are those of a bundle, `quantised` says whether its text graphs are. None where nothing was measured.
    """
    if backend not in MEASURED or (weights > _FEW_WEIGHTS and not quantised):
        return None
    measured, here = MEASURED[backend], this_machine()
    # By products alone: what copies take varies two-fold from one look to the next on one machine.
    slower = measured.speed.products / here.products
    return bundles * (measured.any_model_s + weights / 1e9 * (measured.products + measured.copies)) * slower


@cache
def this_machine() -> Speed:
    """What this machine does, from a fifth of a second of processor time, which a busy machine hardly changes."""
    rows, width = 512, 2048
    left, right = np.ones((rows, width), np.float32), np.ones((width, width), np.float32)
    source = np.ones(2**24, np.float32)
    target = np.empty_like(source)
    product_s = _best(lambda: left @ right)
    copy_s = _best(lambda: np.copyto(target, source))
    # Processor time is that of all cores together.
    return Speed((os.cpu_count() or 1) * 2e-9 * rows * width**2 / product_s, 2e-9 * source.nbytes / copy_s)


def _best(work: Callable[[], object]) -> float:
    """The least processor time of a few runs; the first also brings what it needs into memory."""
    times = []
    for _ in range(4):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return max(min(times), 1e-6)
