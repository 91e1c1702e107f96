"""Reads a bundle back from disk, has a device run it, judges what that tells, and reports."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from runtime.bundle import REPORT_FILES, read_bundle
from runtime.check.judge import check
from runtime.check.verdict import Verdict, together
from runtime.devices.desktop import Desktop
from runtime.devices.findings import Job, Timing
from runtime.errors import BundleError
from runtime.report import write_reports

Progress = Callable[[str], None]


def verify(path: str | os.PathLike[str], *, threads: int | None = None, progress: Progress | None = None) -> Verdict:
    """Checks hashes, preprocessing and parity of a bundle from disk, at each of its keeps, without writing anything.

    A result that differs is a Verdict that did not pass; a bundle that cannot be trusted is a BundleError. `threads`
    None means the cores of the machine, at most 4; `progress` is told what is being done. ONNX bundles need no torch.
    """
    bundle, device = read_bundle(Path(path)), Desktop(progress)
    return together(bundle, [check(view, device.run(view, Job(threads=threads))) for view in bundle.views])


def check_bundle(
    path: Path,
    *,
    twin: Path | None = None,
    warmup: int = 2,
    runs: int = 10,
    threads: int | None = None,
    out_dir: Path | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Does what `verify` does, measures too, and writes parity.json, latency.json, report.md and report.html.

    They go into the bundle, which must not be finished yet, or into `out_dir`. `twin` is the unpruned twin's folder.
    Of several keeps each is compared with it and has reports of its own, such as `report-keep64.html`, beside those of
    all.
    """
    bundle = read_bundle(path)
    listed = [name for name in REPORT_FILES if name in bundle.manifest.files]
    if out_dir is None and listed:
        raise BundleError(
            f"{path} is finished and already holds {', '.join(listed)}; give another folder for new reports, "
            "or use `pruneport verify`, which writes nothing"
        )
    timing = Timing(warmup=warmup, runs=runs, twin=read_bundle(twin) if twin is not None else None)
    device, folder = Desktop(progress), bundle.path if out_dir is None else out_dir
    verdicts = []
    for view in bundle.views:
        verdicts.append(check(view, device.run(view, Job(threads=threads, timing=timing))))
        if view.is_view:
            write_reports(view, verdicts[-1], folder)
    verdict = together(bundle, verdicts)
    write_reports(bundle, verdict, folder)
    return verdict
