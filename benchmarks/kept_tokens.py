"""What quantising each half of the vision graph does to the kept tokens, at full width.

    python benchmarks/kept_tokens.py [--photos 6]

Builds the vision graph of llava-1.5-7b (cut 2, keep 64, seeded random weights) and runs it in PyTorch on sample photos,
with the tower, the two decoder layers in front of the pruner, or both quantised as XNNPACK gets them:

    tower             the scheme of vision tower and projector
    attention, rest   the schemes of the decoder layers below the cut
    keys              relative error (L2) of the keys that the tokens are chosen by, mean over the photos
    kept              share of the kept tokens that the float32 graph keeps too

Random weights have no structure that tokens could be told apart by: their choice is as sensitive as it can be. Writes
benchmarks/results/kept_tokens.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULT = ROOT / "benchmarks/results/kept_tokens.json"
KEEP, CUT = 64, 2
TOWER = "8da8w"
# Schemes of the tower, and of attention and the rest of the decoder layers below the cut.
WAYS = (
    (None, ("8da4w", "8da4w")),
    (None, ("8da4w-g32", "8da4w-g32")),
    (None, ("8da8w", "8da4w")),
    (None, ("8da8w", "8da4w-g32")),
    (TOWER, ("8da8w", "8da4w-g32")),
    (TOWER, ("8da8w", "8da8w")),
)


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=6)
    options = parser.parse_args()

    import torch

    from export.calibration import default_photos
    from export.checkpoints import open_checkpoint
    from export.families import MODELS
    from export.graphs.vision import build_vision_encoder
    from export.quantize import quantize
    from pruning import PruneSpec
    from runtime.image import preprocess
    from runtime.latency import device_name

    entry = MODELS["llava-1.5-7b"]
    checkpoint = open_checkpoint(entry, weights="random", seed=0, bars=False)
    image = entry.family.image(checkpoint.folder, checkpoint.geometry)
    photos = default_photos(options.photos)
    pixels = [torch.from_numpy(preprocess(photo, image)) for photo in photos.values()]

    spec = PruneSpec(grid=checkpoint.geometry.grid, keep=KEEP)
    encoder = build_vision_encoder(checkpoint, entry, spec, cut=CUT)
    plain = encoder.decoder_layers

    def seen() -> list[Any]:
        """What the tower hands on of each photo."""
        with torch.no_grad():
            return [encoder.tower(each) for each in pixels]

    def chosen(features: list[Any], layers: tuple[str, str] | None) -> list[tuple[set[int], torch.Tensor]]:
        """The positions of the kept tokens, and the keys of the layer before the pruner, for each photo."""
        encoder.decoder_layers = plain
        if layers is not None:
            encoder.decoder_layers = copy.deepcopy(plain)
            for layer in encoder.decoder_layers:
                quantize(layer.get_submodule("self_attn"), layers[0])
                quantize(layer, layers[1])
        with torch.no_grad():
            outputs = [dict(zip(encoder.output_names, encoder.from_seen(each), strict=True)) for each in features]
        return [(set(out["positions"][0, -KEEP:].tolist()), out[f"key_{CUT - 1}"]) for out in outputs]

    features: dict[str | None, list[Any]] = {None: seen()}
    exact = chosen(features[None], None)
    quantize(encoder.tower, TOWER)
    features[TOWER] = seen()
    rows: list[dict[str, Any]] = []
    for tower, layers in WAYS:
        pairs = list(zip(exact, chosen(features[tower], layers), strict=True))
        kept = [len(want & have) / KEEP for (want, _), (have, _) in pairs]
        keys = [float((have - want).norm() / want.norm()) for (_, want), (_, have) in pairs]
        rows.append(
            {
                "tower": tower or "fp32",
                "attention": layers[0],
                "rest": layers[1],
                "keys": round(statistics.mean(keys), 4),
                "kept": [round(share, 3) for share in kept],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": "python " + " ".join(["benchmarks/kept_tokens.py", *sys.argv[1:]]),
        "machine": f"{device_name()}; PyTorch, not a phone",
        "model": f"{entry.name}, random weights, cut {CUT}, keep {KEEP}",
        "photos": list(photos),
        "tools": {"torch": torch.__version__},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
