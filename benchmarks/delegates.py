"""What each delegate does to the answers about ten photos: tokens kept and said, beside the desktop's in float32.

    python benchmarks/delegates.py [--keep 16] [--only xnnpack-fp16 ...]

Exports `pocket` once for each row of DELEGATES, opens the bundle in its engine, and answers the sample question about
five sample photos and five rendered scenes. The desktop's own answers come from transformers' modules and the paper's
loop. Per photo:

    kept    share of the kept tokens that the desktop keeps too
    same    greedy tokens equal to the desktop's, place by place, of 64
    lead    by how much the desktop's logit led where the first of them differs (null: none does)

The 64 tokens go on behind the one that ends an answer, where a trained model was never asked: near ties are many there.
Writes benchmarks/results/delegates-keep*.json. No figure in it is a time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from runtime.text_graphs import RunningGraph

SNAPDRAGON = "--target android --backend qnn --soc snapdragon-8-gen-3"
DELEGATES = {
    "xnnpack-fp32": "--target android --backend xnnpack --precision fp32",
    "xnnpack-fp16": "--target android --backend xnnpack --precision fp16",
    "xnnpack-8da4w-g32": "--target android --backend xnnpack --precision fp32 --quant-text 8da4w-g32",
    "onnx-fp32": "--target android --backend onnx --precision fp32",
    "onnx-fp16": "--target android --backend onnx --precision fp16",
    "onnx-int4": "--target android --backend onnx --precision fp32 --quant-text int4",
    "webgpu-fp32": "--target android --backend webgpu",
    "webgpu-int4": "--target android --backend webgpu --quant-text int4",
    "qnn-fp16": SNAPDRAGON,
    "coreml-fp16": "--target ios --precision fp16",
    "executorch-coreml-fp16": "--target ios --backend executorch --precision fp16",
}
EACH = 5  # sample photos, and as many rendered scenes


class Recorded:
    """An open graph that remembers what it gave last."""

    def __init__(self, session: RunningGraph) -> None:
        self._session = session
        self.graph = session.graph
        self.last: dict[str, np.ndarray] = {}

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph."""
        self.last = self._session.run(inputs)
        return self.last


def main() -> None:
    """Exports, asks, and writes the result file; rows that are not asked for stay as they are in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=DELEGATES, default=list(DELEGATES))
    options = parser.parse_args()

    from export.calibration import default_photos

    photos = default_photos()
    scenes = [name for name in photos if name.startswith("scene-")][:EACH]
    names = [name for name in photos if not name.startswith("scene-")][:EACH] + scenes
    if len(names) != 2 * EACH:
        raise SystemExit(f"{2 * EACH} photos are needed, {len(names)} are here; install scikit-image")
    target = ROOT / f"benchmarks/results/delegates-keep{options.keep}.json"
    rows = {row["delegate"]: row for row in json.loads(target.read_text())["delegates"]} if target.exists() else {}
    expected: dict[str, dict[str, np.ndarray]] = {}
    for delegate in options.only:
        arguments = f"--model pocket --keep {options.keep} {DELEGATES[delegate]}"
        with tempfile.TemporaryDirectory() as folder:
            bundle = exported(arguments, folder)
            rows[delegate] = {
                "delegate": delegate,
                "command": f"pruneport export {arguments}",
                **_answers(bundle, {name: photos[name] for name in names}, expected),
            }
        print(json.dumps(rows[delegate]))
        ordered = [rows[name] for name in DELEGATES if name in rows]
        result = {
            "command": f"python benchmarks/delegates.py --keep {options.keep}",
            "what": "pocket's answers about ten photos against the desktop's in float32: no figure here is a time",
            "tools": _tools(),
            "delegates": ordered,
        }
        target.write_text(json.dumps(result, indent=2) + "\n")


def exported(arguments: str, folder: str) -> Path:
    """The one bundle that `export.py` makes in an empty folder, whether or not its check finds it within bounds."""
    command = [sys.executable, "export.py", *arguments.split(), "--output-dir", folder, "-q"]
    code = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False).returncode
    if code not in (0, 1):
        raise SystemExit(f"export.py {arguments} ended with {code}")
    (bundle,) = Path(folder).iterdir()
    return bundle


def _answers(
    path: Path, photos: Mapping[str, np.ndarray], expected: dict[str, dict[str, np.ndarray]]
) -> dict[str, Any]:
    """Who ran the graphs of a bundle, and what they answered; `expected` holds the desktop's answers by photo."""
    from runtime.bundle import read_bundle
    from runtime.generation import open_graphs, start_answers
    from runtime.image import preprocess
    from runtime.text_graphs import VISION_ENCODER

    bundle = read_bundle(path)
    question = bundle.golden()["answer.question"].tolist()
    prefix = len(bundle.manifest.prompt.prefix_ids)
    rows = []
    with open_graphs(bundle) as graphs:
        vision = Recorded(graphs[VISION_ENCODER])
        answers = start_answers(bundle, {**graphs, VISION_ENCODER: vision})
        for name, photo in photos.items():
            pixels = preprocess(photo, bundle.manifest.image)
            if name not in expected:
                expected[name] = _desktop(pixels, bundle.manifest.prune.keep, question)
            want, kept = expected[name]["answer.ids"].tolist(), set(expected[name]["kept_indices"].tolist())
            tokens = answers.answer(answers.see(pixels), question, max_new_tokens=len(want), past_end=True)
            got = [token.id for token in tokens]
            ours = set((np.rint(vision.last["positions"].reshape(-1)[prefix:]).astype(int) - prefix).tolist())
            same = [a == b for a, b in zip(want, got, strict=True)]
            lead = None if all(same) else round(float(expected[name]["answer.margin"][same.index(False)]), 4)
            rows.append({"photo": name, "kept": len(ours & kept) / len(kept), "same": sum(same), "lead": lead})
        placements = [graph.placement() for graph in graphs.values()]
        engines = sorted({graph.engine for graph in graphs.values()})
    return {
        "engine": ", ".join(engines),
        "executed": all(placement.executed for placement in placements),
        "emulated": any(placement.emulated for placement in placements),
        "delegate_calls": sum(sum(placement.delegates.values()) for placement in placements),
        "outside": sum(sum(placement.outside.values()) for placement in placements if placement.executed),
        "mean_kept": round(statistics.mean(row["kept"] for row in rows), 4),
        "mean_same": round(statistics.mean(row["same"] for row in rows), 1),
        "photos": rows,
    }


def _desktop(pixels: np.ndarray, keep: int, question: list[int]) -> dict[str, np.ndarray]:
    from export.checkpoints import open_checkpoint
    from export.golden import make_golden
    from export.models.pocket import POCKET
    from export.models.prompt import SampleText
    from pruning import PruneSpec

    text = SampleText(ids=tuple(question), question=tuple(question))
    spec = PruneSpec(grid=POCKET.geometry.grid, keep=keep)
    checkpoint = open_checkpoint(POCKET)
    return make_golden(checkpoint, POCKET, spec, pixel_values=pixels, text=text)


def _tools() -> dict[str, str]:
    from importlib.metadata import version

    names = ("coremltools", "executorch", "onnxruntime", "onnxruntime-ep-webgpu", "onnxruntime-qnn", "torch")
    return {name: version(name) for name in names}


if __name__ == "__main__":
    main()
