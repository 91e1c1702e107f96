"""What devices at the end of a cable, or of a network, have in common: they run a job file and send findings back."""

from __future__ import annotations

import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from runtime.bundle import Bundle
from runtime.devices.findings import Findings, Job
from runtime.devices.received import findings_of
from runtime.devices.wire import GateJob, JobFile, Received, TimingJob, make_job, read_findings
from runtime.errors import OutputError

# A whole answer takes as long as many runs of a graph.
MOST_ANSWERS = 5


def check_before(out_dir: Path, *bundles: Bundle | None) -> None:
    """Raises OutputError where findings are already, BundleError where a file of a bundle is not what it was."""
    if out_dir.exists():
        raise OutputError(f"{out_dir} exists already; choose another place for the findings, or delete it")
    for bundle in bundles:
        if bundle is not None:
            bundle.check_files()


@contextmanager
def arriving(out_dir: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out_dir` when it is whole, and is gone where it is not. Raises OutputError."""
    beside = out_dir.with_name(f".{out_dir.name}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        beside.replace(out_dir)
    except OSError as err:
        raise OutputError(f"{out_dir} cannot be written: {err.strerror or err}") from err
    finally:
        shutil.rmtree(beside, ignore_errors=True)


class RemoteDevice(ABC):
    """A device reached through job files; see `runtime.devices.device.Device`. `gate` None times in any heat."""

    gate: GateJob | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """What reports call it."""

    def collect(
        self,
        bundle: Bundle,
        job: JobFile,
        tensors: dict[str, np.ndarray],
        out_dir: Path,
        *,
        twin: Bundle | None = None,
    ) -> Received:
        """Runs a job there and leaves its findings in `out_dir`, which must not exist: whole, or not at all.

        Raises BundleError, DeviceError, FindingsError, OutputError.
        """
        check_before(out_dir, bundle, twin)
        with arriving(out_dir) as folder:
            self._find(bundle, job, tensors, twin, folder)
        return read_findings(out_dir)

    @abstractmethod
    def _find(
        self, bundle: Bundle, job: JobFile, tensors: dict[str, np.ndarray], twin: Bundle | None, out: Path
    ) -> None:
        """Runs a job there and fills the folder `out` with its findings. Raises what `collect` does."""

    def run(self, bundle: Bundle, job: Job) -> Findings:
        """Runs a job there and reads what came of it."""
        timing = job.timing
        twin = timing.twin if timing else None
        wanted = None
        if timing:
            wanted = TimingJob(warmup=timing.warmup, runs=timing.runs, answers=min(timing.runs, MOST_ANSWERS))
        made, tensors = make_job(bundle, threads=job.threads or 0, timing=wanted, twin=twin, gate=self.gate)
        with tempfile.TemporaryDirectory() as folder:
            received = self.collect(bundle, made, tensors, Path(folder) / "findings", twin=twin)
            return findings_of(bundle, received, twin=twin)
