"""How many of the authors' choices the pruner makes on the emulated Snapdragon NPU, behind quantised layers or not.

    PRUNEPORT_GOLDEN=FOLDER python benchmarks/selections.py [--scheme fp16|a16w8] [--keep 64]

Compiles the pruner alone for one chip and runs every golden selection case of that keep (default: those in
tests/golden). With a16w8 its inputs come through 8-bit products in 16-bit activations that hand them on unchanged but
for the rounding; each kind of features is calibrated on its own, as photos are not calibrated on noise. Writes its rows
into benchmarks/results/qnn-emulated.json; those of other cases stay as they are. No figure in it is a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Compiles, runs, and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", choices=["fp16", "a16w8"], default="fp16")
    parser.add_argument("--keep", type=int, default=64)
    options = parser.parse_args()

    from benchmarks.golden_cases import Case, cases, features_of, program_of
    from benchmarks.pruner_alone import PrunerGraph, QuantisedFeatures, kept_share, opened_on_npu, quantised_on_npu
    from export.backends.qnn import socs
    from pruning import ComparingPruner

    soc = socs()["snapdragon-8-gen-3"]

    program = next(program_of(case) for case in cases() if case.spec.keep == options.keep)
    quantised = options.scheme == "a16w8"
    kinds: dict[str, list[Case]] = {}
    for case in cases():
        if program_of(case) == program:
            kinds.setdefault(case.name.partition("-")[0] if quantised else "all", []).append(case)
    kind = QuantisedFeatures if quantised else PrunerGraph
    target = ROOT / "benchmarks/results/qnn-emulated.json"
    rows = {(row["scheme"], row["case"]): row for row in json.loads(target.read_text())["selections"]}
    for alike in kinds.values():
        graph = kind(ComparingPruner(program.spec), key_width=program.key_width, hidden_width=program.hidden_width)
        features = [tuple(one.numpy() for one in features_of(case.features)) for case in alike]
        with tempfile.TemporaryDirectory() as name:
            loaded = (
                quantised_on_npu(graph, soc, Path(name), features)
                if quantised
                else opened_on_npu(graph, soc, Path(name))
            )
            for case in alike:
                overlap = round(kept_share(case, loaded), 4)
                rows[options.scheme, case.name] = {"case": case.name, "scheme": options.scheme, "overlap": overlap}
                print(options.scheme, case.name, overlap, flush=True)
            loaded.close()
    result = {
        "command": "python benchmarks/selections.py",
        "what": "Qualcomm's x86 emulator of the HTP: no figure here is a time",
        "chip": soc.name,
        "tools": {name: version(name) for name in ("onnxruntime", "onnxruntime-qnn", "torch")},
        "selections": list(rows.values()),
    }
    target.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
