"""What an export of a whole model takes of memory, disk and time, stage by stage, and what its bundle takes to answer.

    python benchmarks/export_memory.py [--model llava-1.5-7b] [--layers 32] [--backend xnnpack] [--output-dir DIR]
    python benchmarks/export_memory.py --starts DIR/BUNDLE [--backend xnnpack]
    python benchmarks/export_memory.py --starts DIR/BUNDLE --runner build/pruneport_runner

Exports the model's geometry with seeded random weights, keep 64, as `pruneport export` does it by default, with as many
decoder layers as are asked for; then starts the bundle twice, each time in a process of its own that opens all graphs
and answers a question about a photo. `--starts` does the latter alone, with a bundle that such a run left, and puts it
into that run's file.

    peak            high-water mark of memory of all processes of the export together, looked at ten times a second
    disk            the most that the output folder held at once
    forecast        what the export said before it began
    cpu_seconds     processor time of all of it; `speed` is that of export/duration.py
    start           from the process's first step to all graphs open, libraries included
    start_cpu       processor time until then, which a busy machine changes less
    resident        high-water mark of the process that answered
    anonymous       what it has in memory at its end that is no page of a file

Exits with 1 where the bundle fails its check. Writes benchmarks/results/export_whole-*.json, and
export_part-*.json of `pocket` and of fewer layers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.peer_systems import model  # noqa: E402 - behind the path
from export.progress import Progress  # noqa: E402 - behind the path

STARTS = 2
# A process that opens a bundle and answers, as `pruneport ask` does; ids stand in for a tokenizer's.
ANSWER = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
import numpy as np
import psutil
from runtime.bundle import read_bundle
from runtime.generation import open_graphs, start_answers
from runtime.latency import peak_rss_bytes
bundle = read_bundle(Path(sys.argv[1]))
with open_graphs(bundle) as graphs:
    answers = start_answers(bundle, graphs)
    start_s, start_cpu_s = time.perf_counter() - began, time.process_time()
    shape = graphs["vision_encoder"].graph.inputs[0].shape
    photo = answers.see(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    tokens = list(answers.answer(photo, list(range(5, 25)), max_new_tokens=8, past_end=True))
    memory = psutil.Process().memory_info()
print(json.dumps({"start_s": round(start_s, 2), "start_cpu_s": round(start_cpu_s, 2),
                  "image_ready_ms": round(photo.image_ready_ms, 1),
                  "ttft_question_ms": round(tokens[0].ms, 1),
                  "token_ms": round(sorted(token.ms for token in tokens[1:])[len(tokens) // 2], 1),
                  "resident_bytes": peak_rss_bytes(), "anonymous_bytes": memory.rss - memory.shared}))
"""


class Stages(Progress):
    """Seconds and the high-water mark of every stage, by its label without the bundle's."""

    def __init__(self, *, stages: int) -> None:
        super().__init__(stages=stages)
        self.measured: dict[str, dict[str, float]] = {}

    def _line(self, head: str, seconds: float, outcome: str, notes: list[str]) -> None:
        super()._line(head, seconds, outcome, notes)
        label = head.partition("] ")[2].partition(",")[0]
        self.measured[label] = {"s": round(seconds, 1), "peak_gib": round(self._peak_bytes / 2**30, 2)}


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=model.MODEL)
    parser.add_argument("--layers", type=int, help="decoder layers, all by default")
    parser.add_argument("--backend", default="xnnpack")
    parser.add_argument("--output-dir", type=Path, help="where the bundle stays; without it, it is removed")
    parser.add_argument("--starts", type=Path, help="a bundle that a run before this one left")
    parser.add_argument("--runner", type=Path, help="start the bundle in the native runner, built for this machine")
    options = parser.parse_args()
    if options.starts:
        path = _file(options.model, options.backend)
        if options.runner:
            measured = {"native_starts": _native_starts(options.starts, options.runner)}
        else:
            measured = {"starts": _starts(options.starts)}
        result = {**json.loads(path.read_text(encoding="utf-8")), **measured}
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(measured, indent=2))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = _measured(options, options.output_dir or Path(folder))
    result["command"] = "python " + " ".join(["benchmarks/export_memory.py", *sys.argv[1:]])
    path = _file(result["model"], options.backend)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))
    sys.exit(0 if result["passed"] else 1)


def _file(name: str, backend: str) -> Path:
    """Where a run is written: `whole` are those of models as they are published."""
    from export import families

    published = name in families.MODELS and families.MODELS[name].hub_id
    kind = "whole" if published else "part"
    return ROOT / f"benchmarks/results/export_{kind}-{name}-{backend}.json"


def _starts(bundle: Path) -> list[dict[str, float]]:
    """What the bundle takes to answer, in a fresh process each time."""
    found = []
    for _ in range(STARTS):
        done = subprocess.run((sys.executable, "-c", ANSWER, str(bundle)), cwd=ROOT, capture_output=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def _native_starts(path: Path, runner: Path) -> list[dict[str, float]]:
    """The same in the native runner, whose first start packs the weights into a file that the later ones map."""
    from runtime.bundle import read_bundle
    from runtime.devices.here import HereDevice
    from runtime.devices.wire import make_job

    bundle = read_bundle(path)
    job, tensors = make_job(bundle, threads=2, checks=False)
    found = []
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        packed = Path(folder) / "packed"
        device = HereDevice(runner=runner, packed=packed)
        for number in range(STARTS):
            file = device.collect(bundle, job, tensors, Path(folder) / f"findings{number}").file
            assert file.answer is not None
            assert file.memory is not None
            (run,) = file.answer.runs
            start_ms = (*file.load.first_ms, *file.load.later_ms)[0]
            found.append(
                {
                    "start_s": round(start_ms / 1e3, 2),
                    "image_ready_ms": round(run.image_ready_ms, 1),
                    "ttft_question_ms": round(run.ttft_question_ms, 1),
                    "token_ms": round(sorted(run.token_ms)[len(run.token_ms) // 2], 1),
                    "resident_bytes": file.memory.peak_rss_bytes,
                    "packed_bytes": sum(part.stat().st_size for part in packed.iterdir()),
                }
            )
    return found


def _measured(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from export import families
    from export.duration import this_machine
    from export.pipeline import export, stage_count
    from export.request import Request, needed_seconds, plan
    from runtime.latency import device_name

    entry = families.MODELS[options.model]
    if options.layers is not None:
        entry = model.entry(options.layers, options.model)
        families.MODELS = {entry.name: entry}
    planned = plan(
        Request(
            model=entry.name,
            keep="64",
            target="android",
            backend=options.backend,
            weights="random",
            output_dir=str(folder),
            force=True,
        )
    )
    expected = needed_seconds(planned)
    stages = Stages(stages=stage_count(planned))
    watch = _Watch(folder)
    began = time.monotonic()
    made = export(planned, progress=stages, version="benchmark")
    seconds = time.monotonic() - began
    watch.stop()
    path = planned.bundle.path
    shipped = {file for graph in made.bundle.manifest.graphs for file in graph.files}
    return {
        "machine": f"{device_name()}; not a phone",
        "model": entry.name,
        "backend": options.backend,
        "passed": made.verdict.passed,
        "load_average": round(os.getloadavg()[0], 1),
        "seconds": round(seconds),
        "cpu_seconds": round(sum(os.times()[:4])),
        "speed": {name: round(value, 1) for name, value in this_machine()._asdict().items()},
        "stages": stages.measured,
        "peak_bytes": watch.memory,
        "disk_peak_bytes": watch.disk,
        "forecast": {"ram_bytes": planned.needs.ram_bytes, "disk_bytes": planned.needs.disk_bytes, "seconds": expected},
        "shipped_bytes": sum((path / file).stat().st_size for file in shipped),
        "bundle_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "starts": _starts(path),
    }


class _Watch(threading.Thread):
    """The most memory that this process and its children took together, and the most that a folder's files took."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.memory = self.disk = 0
        self._over = threading.Event()
        self.start()

    def run(self) -> None:
        this = psutil.Process()
        while not self._over.wait(0.1):
            memory = disk = 0
            for process in (this, *this.children(recursive=True)):
                with suppress(psutil.Error):  # ended since it was listed
                    memory += process.memory_info().rss
            for path in self.folder.rglob("*"):
                with suppress(OSError):  # gone since it was listed
                    disk += path.stat().st_blocks * 512
            self.memory, self.disk = max(self.memory, memory), max(self.disk, disk)

    def stop(self) -> None:
        self._over.set()
        self.join()


if __name__ == "__main__":
    main()
