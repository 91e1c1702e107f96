"""How much time the pruner adds to the vision tower, inside the vision graph, as a ratio within one run on XNNPACK.

    python benchmarks/pruner_overhead.py [--quant-vision 8da8w] [--cut 2|0] [--keep 64]

Exports the vision graph of llava-1.5-7b at full width (CLIP ViT-L/14-336, seeded random weights) and its unpruned twin,
runs the pruned one with ExecuTorch's event tracer, and splits each run's time by operator: the CLIP tower is everything
before the projector's first linear layer, the pruner everything after the last linear layer beyond what the twin does.
Tracing adds its cost to each of the pruner's many small operators, so the ratio is an upper bound. Random weights make
no difference to the time: the graph does the same work whatever it sees.
Writes benchmarks/results/pruner_overhead-*.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant-vision", choices=["8da8w"], default=None)
    parser.add_argument("--cut", type=int, choices=[2, 0], default=2)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()

    import torch
    from executorch.extension.pybindings import portable_lib

    from export.backends.executorch import FILE
    from export.backends.xnnpack import lower
    from export.checkpoints import open_checkpoint
    from export.families import MODELS
    from export.graphs.vision import build_vision_encoder
    from export.quantize import quantize
    from pruning import PruneSpec
    from runtime.latency import device_name

    entry = MODELS["llava-1.5-7b"]
    checkpoint = open_checkpoint(entry, weights="random", seed=0)
    photo = (torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0)),)
    portable_lib._unsafe_reset_threadpool(options.threads)
    if (got := portable_lib._threadpool_get_thread_count()) != options.threads:
        raise SystemExit(f"ExecuTorch runs {got} threads instead of {options.threads}")
    with tempfile.TemporaryDirectory() as name:
        events = {}
        for graph, spec, runs in (("twin", None, 1), ("pruned", PruneSpec(keep=options.keep), options.runs)):
            encoder = build_vision_encoder(
                checkpoint, entry, spec, cut=options.cut, framed=options.cut > 0, precision="fp32"
            )
            if options.quant_vision:
                quantize(encoder, options.quant_vision)
            lower({graph: encoder}, Path(name))
            (Path(name) / FILE).rename(Path(name) / f"{graph}.pte")
            del encoder
            events[graph] = _events(Path(name) / f"{graph}.pte", photo, runs)
    linear, twins_linear = (
        [i for i, (name, _) in enumerate(events[graph]) if name.startswith("Fully Connected")]
        for graph in ("pruned", "twin")
    )
    # The projector has two linear layers; at the decoder two layers of seven follow them.
    projector = linear[-2 - options.cut * 7]
    # Up to the last linear layer the pruned graph does what the twin does; what it does besides is the pruner's, and so
    # is what comes after, but for as many operators as the twin has there.
    theirs = iter(name for name, _ in events["twin"][: twins_linear[-1] + 1])
    wanted = next(theirs)
    pruner = []
    for i, (name, _) in enumerate(events["pruned"][: linear[-1] + 1]):
        if name == wanted:
            wanted = next(theirs, "")
        else:
            pruner.append(i)
    if wanted or len(pruner) > 8:
        raise SystemExit(f"the twin is not the beginning of the pruned graph: {len(pruner)} operators differ")
    tail = len(events["twin"]) - twins_linear[-1] - 1
    pruner += range(linear[-1] + 1 + tail, len(events["pruned"]))
    tower = [i for i in range(projector) if i not in pruner]
    runs_ms = list(zip(*(times for _, times in events["pruned"]), strict=True))
    tower_ms = [sum(run[i] for i in tower) for run in runs_ms]
    pruner_ms = [sum(run[i] for i in pruner) for run in runs_ms]
    ratios = [100.0 * part / whole for part, whole in zip(pruner_ms, tower_ms, strict=True)]
    result = {
        "command": "python " + " ".join(["benchmarks/pruner_overhead.py", *sys.argv[1:]]),
        "machine": f"{device_name()}; not a phone",
        "threads": options.threads,
        "graph": f"llava-1.5-7b vision_encoder, cut {options.cut}, tower {options.quant_vision or 'fp32'}, rest fp32",
        "keep": options.keep,
        "operators": {"tower": len(tower), "pruner": len(pruner), "whole": len(events["pruned"])},
        "median_ms": {
            "tower": round(statistics.median(tower_ms), 1),
            "pruner": round(statistics.median(pruner_ms), 2),
            "whole": round(statistics.median(map(sum, runs_ms)), 1),
        },
        "overhead_percent_of_tower": {
            "median": round(statistics.median(ratios), 3),
            "least": round(min(ratios), 3),
            "most": round(max(ratios), 3),
            "runs": len(ratios),
        },
    }
    label = f"cut{options.cut}-{options.quant_vision or 'fp32'}-keep{options.keep}"
    (ROOT / f"benchmarks/results/pruner_overhead-{label}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _events(program: Path, inputs: tuple[Any, ...], runs: int) -> list[tuple[str, list[float]]]:
    """Kind of each operator inside the delegate, in order, and its milliseconds in each run after two to warm up."""
    from executorch.devtools import Inspector
    from executorch.extension.pybindings import portable_lib

    dump = str(program.with_suffix(".etdp"))
    module = portable_lib._load_for_executorch(str(program), enable_etdump=True)
    for _ in range(2 + runs):
        module.run_method(program.stem, inputs)
    module.write_etdump_result_to_file(dump)
    del module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (block,) = [b for b in Inspector(etdump_path=dump).event_blocks if b.name == "Execute"]
    return [
        (re.sub(r" #\d+$", "", event.name), [float(ms) for ms in event.perf_data.raw[2:]])
        for event in block.events
        if event.is_delegated_op and event.perf_data is not None
    ]


if __name__ == "__main__":
    main()
