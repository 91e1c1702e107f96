"""What an export takes of memory and disk at full width, stage by stage.

    python benchmarks/export_memory.py [--layers 3] [--quant-text 8da4w] [--no-check]

Exports LLaVA-1.5-7B's geometry for XNNPACK with as many of its 32 decoder layers as are asked for and seeded random
weights, in one process. Memory is the high-water mark of that process at the end of each stage, disk the most that the
output folder held at once. `--no-check` stops in front of the check in the engine, whose memory is the engine's.
Writes benchmarks/results/memory-*.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.answers import _entry  # noqa: E402 - behind the path
from export.progress import Progress  # noqa: E402 - behind the path


class _Enough(Exception):
    """Everything that was to be measured is done."""


class Stages(Progress):
    """Seconds and the high-water mark of every stage, by its label without the bundle's."""

    def __init__(self, *, stages: int, last: str | None) -> None:
        super().__init__(stages=stages)
        self.last = last
        self.measured: dict[str, dict[str, float]] = {}

    def _line(self, head: str, seconds: float, outcome: str, notes: list[str]) -> None:
        super()._line(head, seconds, outcome, notes)
        label = head.partition("] ")[2].partition(",")[0]
        self.measured[label] = {"s": round(seconds, 1), "peak_gib": round(self._peak_bytes / 2**30, 2)}
        if label == self.last and not outcome:
            raise _Enough


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--quant-text", default="8da4w")
    parser.add_argument("--no-check", action="store_true")
    options = parser.parse_args()

    from export import families
    from export.pipeline import export, stage_count
    from export.request import Request, plan
    from runtime.latency import device_name

    entry = _entry(options.layers)
    families.MODELS = {entry.name: entry}
    with tempfile.TemporaryDirectory() as folder:
        planned = plan(
            Request(
                model=entry.name,
                keep="64",
                target="android",
                weights="random",
                quant_text=options.quant_text,
                output_dir=folder,
                force=True,
            )
        )
        stages = Stages(stages=stage_count(planned), last="write the bundle" if options.no_check else None)
        disk = _Disk(Path(folder))
        with suppress(_Enough):
            export(planned, progress=stages, version="benchmark")
        disk.stop()
    result: dict[str, Any] = {
        "command": "python " + " ".join(["benchmarks/export_memory.py", *sys.argv[1:]]),
        "machine": f"{device_name()}; not a phone",
        "model": entry.name,
        "quant_text": options.quant_text,
        "stages": stages.measured,
        "lowering_gib": stages.measured["trace and lower"]["peak_gib"],
        "bundle_bytes": disk.last,
        "disk_peak_bytes": disk.most,
        "forecast": {"ram_bytes": planned.needs.ram_bytes, "disk_bytes": planned.needs.disk_bytes},
    }
    name = f"memory-{options.layers}layers-{options.quant_text}.json"
    (ROOT / "benchmarks/results" / name).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


class _Disk(threading.Thread):
    """The most that the files below a folder took at once, looked at twice a second."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.most = self.last = 0
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.5):
            taken = 0
            for path in self.folder.rglob("*"):
                with suppress(OSError):  # gone since it was listed
                    taken += path.stat().st_blocks * 512
            self.most, self.last = max(self.most, taken), taken or self.last

    def stop(self) -> None:
        self._over.set()
        self.join()


if __name__ == "__main__":
    main()
