"""How much time the pruner adds to the vision tower, as a ratio within one run on XNNPACK.

    python benchmarks/pruner_overhead.py [--quant-vision 8da8w] [--precision fp32] [--threads 2] [--runs 15]

Builds the tower and projector of llava-1.5-7b (CLIP ViT-L/14-336, full width, seeded random weights) and the pruner
alone for both placements (features 4096 wide; keys 4096 wide in the decoder, 1024 at the projector), lowers each to
XNNPACK, runs them in turns and compares their medians. Run alone, the pruner also copies its inputs into the program,
so the ratios are upper bounds of what it costs inside the graph. Writes benchmarks/results/pruner_overhead-*.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant-vision", choices=["8da8w"], default=None)
    parser.add_argument("--precision", choices=["fp32", "fp16"], default="fp32")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()

    import torch

    from export.backends.executorch import lower
    from export.checkpoints import open_checkpoint
    from export.graphs.vision import build_vision_encoder
    from export.models import MODELS
    from pruning import PruneSpec, TokenPruner, reference

    torch.manual_seed(0)
    entry = MODELS["llava-1.5-7b"]
    spec = PruneSpec(keep=options.keep)
    width, count = 4096, spec.tokens
    field = torch.nn.functional.avg_pool2d(torch.randn(1, width, *spec.grid), 5, 1, 2).flatten(2).transpose(1, 2)
    hidden = ((field * 4.0 + torch.randn(1, count, width) * 0.3) * torch.rand(width) * 2.0).contiguous()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs = {}
        for placement, keys_width in (("decoder", 4096), ("projector", 1024)):
            keys = torch.randn(1, count, keys_width) + torch.randn(keys_width)
            lower(TokenPruner(spec), (keys, hidden), folder, placement, precision="fp32", quant_vision=None)
            programs[placement] = (_load(folder / f"{placement}.pte", options.threads), [keys, hidden])
            got = programs[placement][0].execute([keys, hidden])[1].long()
            if not torch.equal(got, reference.trace(keys, hidden, spec).indices):
                raise SystemExit(f"the lowered pruner for the {placement} differs from the reference: not timed")
        checkpoint = open_checkpoint(entry, weights="random", seed=0)
        tower = build_vision_encoder(checkpoint, entry, None, placement="projector", precision=options.precision)
        lower(
            tower,
            tower.example_inputs(),
            folder,
            "tower",
            precision=options.precision,
            quant_vision=options.quant_vision,
        )
        programs["tower"] = (_load(folder / "tower.pte", options.threads), list(tower.example_inputs()))
        times: dict[str, list[float]] = {name: [] for name in programs}
        for run in range(options.runs + 2):
            for name, (method, inputs) in programs.items():
                start = time.perf_counter()
                method.execute(inputs)
                if run >= 2:
                    times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "command": "python " + " ".join(["benchmarks/pruner_overhead.py", *sys.argv[1:]]),
        "machine": f"desktop CPU, {platform.machine()}, {_processor()}; not a phone",
        "threads": options.threads,
        "tower": f"CLIP ViT-L/14-336 and projector, {options.precision}, {options.quant_vision or 'not quantised'}",
        "keep": options.keep,
        "median_ms": {name: round(value, 3) for name, value in medians.items()},
        "min_ms": {name: round(min(values), 3) for name, values in times.items()},
        "overhead_percent": {
            name: round(100.0 * medians[name] / medians["tower"], 3) for name in ("decoder", "projector")
        },
        "overhead_percent_of_minima": {
            name: round(100.0 * min(times[name]) / min(times["tower"]), 3) for name in ("decoder", "projector")
        },
    }
    file = ROOT / f"benchmarks/results/pruner_overhead-{options.precision}-{options.quant_vision or 'none'}.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _load(path: Path, threads: int):  # type: ignore[no-untyped-def]
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    portable_lib._unsafe_reset_threadpool(threads)
    if portable_lib._threadpool_get_thread_count() != threads:
        raise SystemExit(f"ExecuTorch runs {portable_lib._threadpool_get_thread_count()} threads instead of {threads}")
    program = Runtime.get().load_program(path)
    return program.load_method("forward")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
