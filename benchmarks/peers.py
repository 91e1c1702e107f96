"""pruneport beside what people use instead, at full width, all in turns in one run.

    python benchmarks/peers.py [--layers 8] [--threads 2] [--rounds 5] [--only pruneport-keep64 ...] [--memory 12]

LLaVA-1.5-7B's width with fewer decoder layers and seeded random weights, the same everywhere; one photo, a question of
20 tokens, the prompt's prefix in the cache before anything is timed:

    pruneport-keep64              `pruneport export --keep 64 --target android`, asked as `pruneport ask` does
    pruneport-twin                the same with all image tokens
    pruneport-onnx-int4           keep 64 with `--backend onnx --quant-text int4`
    llama.cpp-q4_0                libmtmd, decoder in Q4_0, tower in float16, all else as it comes
    llama.cpp-q4_0-mmproj-q8_0    the same with the tower in Q8_0 and micro-batches of 1024 tokens
    transformers-bf16             LlavaForConditionalGeneration in eager PyTorch, sdpa
    transformers-fp32             the same in float32

What is needed is made the first time and kept in `--work`: llama.cpp from its public sources (llama-cpp-python on PyPI,
two lines patched, see benchmarks/peer_systems/llama_cpp.py) with -march=native, the weights as GGUF, the bundles. A C++
compiler must be there. What is made from this checkout's code is made anew when that has changed.

Measured from pixel values to the image's whole KV cache (image ready), from the question's ids to the first token (TTFT
of a question), both (TTFT of a photo: it and the question arrive at once), and by the median of the further tokens.
Each round takes all systems in turn, the next one in reverse, two runs each; the first is the warm-up. Before each run
the machine is waited for until others take less than 0.15 cores; what they took meanwhile stands beside each sample,
and the medians are those of the runs that they left alone, where there are any. As many systems are in memory at once
as fit into `--memory`, by their own peaks; the one used least recently is stopped, and one that was started again makes
a run that does not count. A system that takes more alone is not measured, and that is said.

A bundle whose own check fails is not measured. That all compute the same is checked: the image features (of pruneport,
which does not hand them out, the values of the first decoder layer, in its own quantisation) must have a cosine of at
least 0.99 with those of transformers' own modules in float32; anything else ends the run.

Writes benchmarks/results/peers.json, in which a row replaces that of the same processor, layers and system. Prints the
table, the ratios, and where pruneport loses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402 - found with the line above

from benchmarks.peer_systems import model, rows, turns  # noqa: E402
from benchmarks.peer_systems.kept import StepError  # noqa: E402
from benchmarks.peer_systems.systems import SYSTEMS, Ready, Settings, write_inputs  # noqa: E402
from benchmarks.peer_systems.worker import CHECK, RUN  # noqa: E402

RESULT = ROOT / "benchmarks/results/peers.json"
RUNS_A_TURN = 2
NEW_TOKENS = 32
LEAST_COSINE = 0.99
# What the driver and everything else on the machine may need while workers fill the rest.
RESERVE_BYTES = 2 * 2**30


def main() -> None:
    """Makes what is missing, measures, writes the result file and prints what it says."""
    options = _options()
    settings = Settings(
        layers=options.layers, threads=options.threads, new_tokens=NEW_TOKENS, work=options.work.absolute()
    )
    write_inputs(settings)
    ready, unmade = _ready(settings, options.only)
    budget = int(options.memory * 2**30) if options.memory else psutil.virtual_memory().available - RESERVE_BYTES
    run = Measurement(settings, ready, unmade, budget_bytes=budget, patience_s=options.patience)
    try:
        run.rounds(options.rounds)
    finally:
        run.crew.stop_all()
    made = run.rows()
    if not made:
        raise SystemExit(f"nothing was measured: {'; '.join(f'{name} {why}' for name, why in run.unmeasured.items())}")
    result = {
        **{name: made[0][name] for name in ("command", "machine", "processor", "threads", "date")},
        "model": f"{model.MODEL} with {settings.layers} decoder layers, random weights",
        "versions": {name: text for row in made for name, text in row["versions"].items()},
        "question_tokens": model.QUESTION_TOKENS,
        "new_tokens": settings.new_tokens,
        "rounds": options.rounds,
        "runs_a_turn": RUNS_A_TURN,
        "memory_rule": (
            f"workers whose peaks together stay within {budget / 2**30:.1f} GiB live at once; the least recently used "
            "is stopped; one that is started again makes a run that does not count"
        ),
        "not_measured": run.unmeasured,
        "rows": rows.merged(json.loads(RESULT.read_text())["rows"] if RESULT.exists() else [], made),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    _tell(made, run.unmeasured)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers, 3 to 32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after the warm-up")
    parser.add_argument("--only", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="systems, all by default")
    parser.add_argument("--memory", type=float, help="GiB for all workers together; what is free, by default")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds to wait for a quiet machine before a run")
    parser.add_argument("--work", type=Path, default=ROOT / "build/peers", help="where what is made is kept")
    options = parser.parse_args()
    if not model.LEAST_LAYERS <= options.layers <= model.MOST_LAYERS:
        parser.error(f"--layers {options.layers} must lie in {model.LEAST_LAYERS}..{model.MOST_LAYERS}")
    if min(options.threads, options.rounds) < 1:
        parser.error("--threads and --rounds must be at least 1")
    return options


def _ready(settings: Settings, names: Sequence[str]) -> tuple[dict[str, Ready], dict[str, str]]:
    """The systems that can be started, and why the others cannot."""
    ready, unmade = {}, {}
    for name in names:
        try:
            ready[name] = SYSTEMS[name](settings)
        except StepError as error:
            unmade[name] = str(error)
            print(f"{name} cannot be made: {error}", flush=True)
    return ready, unmade


class Measurement:
    """One run: the workers, what was measured so far, and what could not be."""

    def __init__(
        self,
        settings: Settings,
        ready: Mapping[str, Ready],
        unmade: Mapping[str, str],
        *,
        budget_bytes: int,
        patience_s: float,
    ) -> None:
        self._settings, self._ready, self._patience_s = settings, ready, patience_s
        self.crew = turns.Crew(
            {name: each.command for name, each in ready.items()},
            logs=settings.depth / "logs",
            budget_bytes=budget_bytes,
            root=ROOT,
        )
        self.unmeasured = dict(unmade)
        self._samples: dict[str, list[dict[str, Any]]] = {name: [] for name in ready}
        self._said: dict[str, dict[str, Any]] = {}

    def rounds(self, count: int) -> None:
        """A warm-up, in which everything is checked, and `count` rounds. SystemExit for a system that computes
        something else."""
        for number in range(count + 1):
            for name in list(self._ready) if number % 2 == 0 else reversed(list(self._ready)):
                if name not in self.unmeasured:
                    try:
                        self._turn(name, number)
                    except turns.WorkerError as error:
                        self.crew.stop(name)
                        self.unmeasured[name] = str(error)
                        print(f"{name} is not measured: {error}", flush=True)

    def _turn(self, name: str, number: int) -> None:
        worker, fresh = self.crew.worker(name)
        if name not in self._said:
            self._said[name] = {**worker.ready, **self._checked(name, worker)}
        if fresh:
            worker.ask(RUN)
        for _ in range(RUNS_A_TURN if number else 0):
            self._samples[name].append({"round": number, **self._run(worker)})
        self._said[name]["peak_rss_bytes"] = self.crew.measured(name)
        last = self._samples[name][-1:]
        print(f"round {number}: {name} {json.dumps(last[0]) if last else 'warm'}", flush=True)

    def _run(self, worker: turns.Worker) -> dict[str, Any]:
        """One run, and what went on meanwhile."""
        turns.wait_for_quiet(self._patience_s)
        busy, own, start = turns.busy_s(), worker.cpu_s(), time.monotonic()
        answer = worker.ask(RUN)
        wall = time.monotonic() - start
        own = worker.cpu_s() - own
        foreign = max(0.0, turns.busy_s() - busy - own)
        return rows.sample(
            answer,
            own_cores=round(own / wall, 2),
            foreign_cores=round(foreign / wall, 2),
            load_average=round(os.getloadavg()[0], 2),
        )

    def _checked(self, name: str, worker: turns.Worker) -> dict[str, Any]:
        file = self._settings.depth / f"{name}.f32"
        compared = worker.ask(f"{CHECK}{file}")["compared"]
        cosine = model.cosine(self._settings.inputs, compared, file)
        file.unlink()
        if not cosine >= LEAST_COSINE:
            raise SystemExit(
                f"{name} computes something else: its {compared} have a cosine of {cosine:.4f} with those of "
                f"transformers in float32, at least {LEAST_COSINE} is allowed; nothing was written"
            )
        return {"compared": compared, "cosine": round(cosine, 6)}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each system that was measured to the end."""
        from runtime.latency import device_name

        common = {
            "command": "python " + " ".join(["benchmarks/peers.py", *sys.argv[1:]]),
            "processor": processor(),
            "machine": f"{device_name()}; not a phone",
            "threads": self._settings.threads,
            "date": datetime.now(UTC).date().isoformat(),
        }
        made = []
        for name, each in self._ready.items():
            if name in self.unmeasured:
                continue
            said, samples = self._said[name], self._samples[name]
            made.append(
                {
                    "system": name,
                    "layers": self._settings.layers,
                    **rows.summary(samples),
                    "peak_rss_bytes": said["peak_rss_bytes"],
                    "file_bytes": each.file_bytes,
                    **({"image_ready_flop": each.image_ready_flop} if each.image_ready_flop else {}),
                    **common,
                    "versions": {**each.versions, **said.get("versions", {}), "numpy": version("numpy")},
                    "note": "; ".join(filter(None, (each.note, said.get("build", "")))),
                    "compared": said["compared"],
                    "cosine": said["cosine"],
                    "starts": self.crew.starts[name],
                    "samples": samples,
                }
            )
        return made


def processor() -> str:
    """The processor in words, fine enough to tell apart those of one name, e.g. `AMD EPYC, family 26, model 2`."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']}, family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}"


def _tell(made: Sequence[rows.Row], unmeasured: Mapping[str, str]) -> None:
    """Prints the table, the ratios, and where pruneport loses."""
    print(f"\n{made[0]['processor']}, {made[0]['threads']} threads, {made[0]['layers']} layers; medians")
    _print_table([rows.heads(), *(rows.cells(row) for row in made)])
    compared = rows.ratios(made)
    if compared:
        print("\ntimes better than others; below 1 is worse")
        _print_table([rows.ratio_heads(), *compared])
    print()
    not_measured = [f"{name} was not measured: {why}" for name, why in unmeasured.items()]
    print("\n".join([*rows.losses(made), *rows.pruning(made), *rows.spending(made), *not_measured, rows.load(made)]))


def _print_table(lines: Sequence[Sequence[str]]) -> None:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for first, *rest in lines:
        print(
            "  ".join(
                [first.ljust(widths[0]), *(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))]
            )
        )


if __name__ == "__main__":
    main()
