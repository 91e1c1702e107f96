"""What emulators and evaluations say of whole bundles: nodes taken, files, and how near they are to the desktop.

    python benchmarks/bundles.py [--only qnn-fp16 ...]

Exports each of BUNDLES with the printed command and takes the figures from its manifest and parity.json. The one of
llava-1.5-7b has random weights and needs 3 GiB of memory. Writes benchmarks/results/bundles.json; rows that are not
asked for stay as they are in it. No figure in it is a time, nor was a Snapdragon or Core ML run.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.delegates import SNAPDRAGON, exported  # noqa: E402 - found through the line above

BUNDLES = {
    "qnn-fp16": f"--model pocket --keep 16 {SNAPDRAGON}",
    "qnn-fp16-keep64": f"--model pocket --keep 64 {SNAPDRAGON}",
    "qnn-a16w8": f"--model pocket --keep 16 {SNAPDRAGON} --quant-vision a16w8",
    "coreml-fp32": "--model pocket --keep 64 --target ios",
    "coreml-int4": "--model pocket --keep 64 --target ios --precision fp16 --quant-vision int8 --quant-text int4",
    "coreml-7b": "--model llava-1.5-7b --keep 64 --target ios --weights random --only vision",
}


def main() -> None:
    """Exports, reads, and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BUNDLES, default=list(BUNDLES))
    options = parser.parse_args()

    target = ROOT / "benchmarks/results/bundles.json"
    rows = {row["bundle"]: row for row in json.loads(target.read_text())["bundles"]} if target.exists() else {}
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            figures = _figures(exported(BUNDLES[name], folder))
            rows[name] = {"bundle": name, "command": f"pruneport export {BUNDLES[name]}", **figures}
        print(json.dumps(rows[name]), flush=True)
        result = {
            "command": "python benchmarks/bundles.py",
            "what": "emulated (Snapdragon) or evaluated by numpy (Core ML) on a desktop CPU: no figure here is a time",
            "tools": {
                name: version(name) for name in ("coremltools", "numpy", "onnxruntime", "onnxruntime-qnn", "torch")
            },
            "bundles": [rows[name] for name in BUNDLES if name in rows],
        }
        target.write_text(json.dumps(result, indent=2) + "\n")


def _figures(path: Path) -> dict[str, Any]:
    from runtime.bundle import read_bundle

    bundle = read_bundle(path)
    parity = json.loads((path / "parity.json").read_text())
    # Where other tokens are kept, some outputs have nothing to be compared with.
    errors = {
        graph["graph"]: [tensor["rel"] for tensor in graph["tensors"] if tensor["rel"] is not None]
        for graph in parity["graphs"]
    }
    graphs = [
        {
            "graph": placement["graph"],
            "operators": sum(one.nodes for one in bundle.graph(placement["graph"]).coverage),
            "outside": sum(placement["outside"].values()) if placement["executed"] else 0,
            "worst_rel": float(f"{max(errors[placement['graph']]):.2g}"),
        }
        for placement in parity["placements"]
    ]
    (kept,) = (graph["kept"]["overlap"] for graph in parity["graphs"] if graph["kept"])
    answer = parity["answer"] or {}
    files = {file for graph in bundle.manifest.graphs for file in (graph.file, *graph.extra_files)}
    return {
        "graphs": graphs,
        "file_bytes": sum((path / file).stat().st_size for file in files if (path / file).is_file()),
        "passed": all(step["status"] == "passed" for step in parity["steps"]),
        "kept_overlap": kept,
        "answer_tokens": answer.get("expected_count"),
        "answer_tokens_same": answer.get("same"),
    }


if __name__ == "__main__":
    main()
