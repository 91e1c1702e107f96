"""Makes again what is recorded of pocket, after its weights have changed.

    python benchmarks/pocket_records.py               # the short part: what tests look at, and the README
    python benchmarks/pocket_records.py all           # the long part, too
    python benchmarks/pocket_records.py list          # what there is, and what is out of date
    python benchmarks/pocket_records.py --only NAME   # these, whatever they are of

benchmarks/pocket_records.json says which weights each record is of. What is of those that are here is left alone, so
that a run that was stopped goes on. Times are measured by the demo and by `forecast-*`: let nothing else run then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bundles import BUNDLES  # noqa: E402 - found through the line above
from benchmarks.delegates import DELEGATES  # noqa: E402 - found through the line above

RESULTS = ROOT / "benchmarks/results"
STAMPS = ROOT / "benchmarks/pocket_records.json"
README = ROOT / "README.md"
DURATION = ROOT / "export/duration.py"
# What `make eval` is given besides, and how each is exported.
ASKED_BUNDLES = ("--backend xnnpack", "--backend onnx", "--backend xnnpack --quant-text 8da4w-g32")
KEEPS = "192,128,64,32,16"
FORECASTS = ("onnx", "xnnpack")
BEGIN, END = "<!-- demo: begin (the real output of `make demo`) -->\n", "<!-- demo: end -->"
_LEFT_OUT = "[...]"


@dataclass(frozen=True)
class Record:
    """Something that was made from pocket's weights: the `files` that hold it, and how to make them again.

    `minutes` are of two quiet cores. `short` ones are made again before other weights land.
    """

    files: tuple[Path, ...]
    minutes: float
    make: Callable[[], None]
    short: bool = False


def _run(*words: str, **variables: str) -> None:
    print("$", " ".join(words), flush=True)
    subprocess.run(words, cwd=ROOT, env={**os.environ, **variables}, check=True)


def _python(*words: str) -> None:
    _run(sys.executable, *words)


def make_vectors() -> None:
    """Writes the vectors of the apps, which hold pocket's tokenizer."""
    _python("-m", "tests.phones.make_vectors")


def make_digests() -> None:
    """Writes the digests of the checkpoint's files, which a checkpoint that training wrote has already."""
    from export.models.pocket import pocket_folder
    from training.write import write_digests

    write_digests(pocket_folder())


def make_demo() -> None:
    """Runs the demo; its last screen goes into the README, its picture into docs/."""
    print("$ make demo", flush=True)
    done = subprocess.run(
        ["make", "--no-print-directory", "demo"],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "110"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise SystemExit(f"make demo ended with {done.returncode}")
    README.write_text(with_demo(README.read_text(encoding="utf-8"), done.stdout), encoding="utf-8")
    shutil.copy(ROOT / "bundles/demo/kept.webp", ROOT / "docs/demo.webp")


def with_demo(readme: str, output: str) -> str:
    """The README with what the demo's output says of pruning: both tables, the first without what is said of files."""
    lines = [line.rstrip() for line in output.splitlines()]
    starts = [number for number, line in enumerate(lines) if line.startswith(("┌", "┏"))]
    ends = [number for number, line in enumerate(lines) if line.startswith(("│ delegates", "└"))]
    if len(starts) != 2 or len(ends) != 3:
        raise SystemExit("make demo did not print its two tables; the README was left as it is")
    shown = [*lines[starts[0] : ends[0]], _LEFT_OUT, *lines[starts[1] : ends[2] + 1]]
    before, rest = readme.split(BEGIN)
    return "".join([before, BEGIN, "```text\n", *(f"{line}\n" for line in shown), "```\n", END, rest.split(END)[1]])


def make_evaluation() -> None:
    """Puts the held-out questions to every method and to bundles; goes on where it was stopped."""
    folder = ROOT / "bundles/records"
    bundles = []
    for arguments in ASKED_BUNDLES:
        words = f"--model pocket --keep 64 --target android {arguments}"
        marked = folder / hashlib.sha256(f"{words} {weights_sha256()}".encode()).hexdigest()[:12]
        if not marked.is_dir():
            _python("export.py", *words.split(), "--output-dir", str(marked), "-q")
        (bundle,) = (path for path in marked.iterdir() if not path.name.startswith("."))
        bundles.append(str(bundle))
    _python("-m", "pruneport", "eval", "--model", "pocket", "--keep", KEEPS, "--method", "all", *bundles)
    summary = json.loads((ROOT / "evaluations/pocket/summary.json").read_text(encoding="utf-8"))
    result = {"command": "python benchmarks/pocket_records.py --only eval", **summary}
    (RESULTS / "eval-pocket.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def make_forecast(backend: str) -> None:
    """Measures an export, and takes what export/duration.py forecasts others from."""
    _python("benchmarks/export_memory.py", "--model", "pocket", "--backend", backend)
    DURATION.write_text(with_constants(DURATION.read_text(encoding="utf-8"), backend), encoding="utf-8")


def with_constants(source: str, backend: str) -> str:
    """The source of export/duration.py with the constants that come of a backend's results."""
    from export.families import MODELS

    small, whole = (
        json.loads((RESULTS / f"export_{name}-{backend}.json").read_text(encoding="utf-8"))
        for name in ("part-pocket", "whole-llava-1.5-7b")
    )
    entry = MODELS["llava-1.5-7b"]
    billions = (entry.vision_parameter_count(0) + entry.text_parameter_count()) / 1e9
    products = sum(whole["stages"][stage]["s"] for stage in ("desktop outputs", "check in the engine"))
    copies = whole["seconds"] - products - small["seconds"]
    speed = f"Speed({small['speed']['products']}, {small['speed']['copies']})"
    constants = f"{small['seconds']:.1f}, {products / billions:.4g}, {copies / billions:.4g}, {speed}"
    changed, count = re.subn(rf'("{backend}": Measured)\(.*\),\n', rf"\1({constants}),\n", source)
    if count != 1:
        raise SystemExit(f"{DURATION} has no line of {backend} in MEASURED")
    return changed


def records() -> dict[str, Record]:
    """Every record by its name, in the order in which they are made."""
    rows = [name for name, arguments in BUNDLES.items() if "--model pocket" in arguments]
    return {
        "digests": Record((ROOT / "export/models/pocket/digests.json",), 0, make_digests, short=True),
        "vectors": Record((ROOT / "tests/phones/vectors/tokens.json",), 0.1, make_vectors, short=True),
        "demo": Record((README, ROOT / "docs/demo.webp"), 3, make_demo, short=True),
        "eval": Record((RESULTS / "eval-pocket.json",), 12, make_evaluation),
        "overlap": Record((RESULTS / "kept_overlap.json",), 7, partial(_python, "benchmarks/kept_overlap.py")),
        "methods": Record((RESULTS / "own_methods.json",), 4, partial(_python, "benchmarks/own_methods.py")),
        **{
            f"bundles-{name}": Record(
                (RESULTS / "bundles.json",), 3, partial(_python, "benchmarks/bundles.py", "--only", name)
            )
            for name in rows
        },
        **{
            f"delegates-{name}": Record(
                (RESULTS / "delegates-keep16.json",),
                2,
                partial(_python, "benchmarks/delegates.py", "--keep", "16", "--only", name),
            )
            for name in DELEGATES
        },
        **{
            f"forecast-{name}": Record(
                (RESULTS / f"export_part-pocket-{name}.json", DURATION), 2, partial(make_forecast, name)
            )
            for name in FORECASTS
        },
    }


def weights_sha256() -> str:
    """The hash of the weights that are here."""
    from export.models.pocket import pocket_folder

    return hashlib.sha256((pocket_folder() / "model.safetensors").read_bytes()).hexdigest()


def stamps() -> Mapping[str, Any]:
    """By record, the hash of the weights that it is of."""
    found: dict[str, Any] = json.loads(STAMPS.read_text(encoding="utf-8")) if STAMPS.exists() else {}
    return found


def main() -> None:
    """Makes what is out of date."""
    known = records()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["short", "all", "list"], default="short")
    parser.add_argument("--only", nargs="+", choices=known, metavar="NAME")
    options = parser.parse_args()

    here = weights_sha256()
    if options.what == "list":
        for name, record in known.items():
            state = "of these weights" if stamps().get(name) == here else "OUT OF DATE"
            files = ", ".join(str(path.relative_to(ROOT)) for path in record.files)
            part = "short" if record.short else "long"
            print(f"{name:34} {part:5} {record.minutes:5.1f} min  {state:16}  {files}")
        return
    wanted = options.only or [
        name for name, record in known.items() if (record.short or options.what == "all") and stamps().get(name) != here
    ]
    for name in wanted:
        known[name].make()
        made = {**stamps(), name: here}
        ordered = {key: made[key] for key in known if key in made}
        STAMPS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    print(f"{len(wanted)} records were made; the others are of these weights or of the long part")


if __name__ == "__main__":
    main()
