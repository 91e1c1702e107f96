"""What it costs in answers that other image tokens are kept than should be.

    python benchmarks/kept_overlap.py [--photos 160]

Takes the tokens that VLM-Pruner keeps of pocket's held-out pictures, puts dropped ones, drawn at random, in the place
of some, and asks the desktop model all questions. So an overlap, which parity bounds, gets a meaning in answers:

    keep       image tokens that stay
    overlap    share of them that VLM-Pruner keeps too
    accuracy   share of right answers, with its 95 % interval
    loss       how much less that is than with all of VLM-Pruner's tokens, with its 95 % interval

Writes benchmarks/results/kept_overlap.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RESULT = ROOT / "benchmarks/results/kept_overlap.json"
CUT = 2
KEEPS = (64, 32)
OVERLAPS = (1.0, 0.98, 0.95, 0.9, 0.8, 0.6)


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=160)
    options = parser.parse_args()

    import msgspec
    import numpy as np
    import torch

    from export.checkpoints import open_checkpoint
    from export.evaluation.eager import EagerModel
    from export.evaluation.questions import read_questions
    from export.evaluation.scores import accuracy, difference
    from export.models.pocket import POCKET
    from pruning import METHODS, PruneSpec
    from runtime.image import load_photo
    from runtime.latency import device_name

    assert POCKET.questions is not None
    questions = read_questions(POCKET.questions).first(options.photos)
    model = EagerModel(open_checkpoint(POCKET), POCKET)
    pruners = {keep: METHODS["vlm-pruner"].module(PruneSpec(grid=model.grid, keep=keep), "float32") for keep in KEEPS}
    right: dict[tuple[int, float], list[list[bool]]] = {(keep, share): [] for keep in KEEPS for share in OVERLAPS}
    for number, photo in enumerate(questions.photos):
        reading = model.read(load_photo(photo.photo), photo.lines, (CUT,))
        features = reading.features[CUT]
        for keep, pruner in pruners.items():
            with torch.no_grad():
                chosen = pruner(features).indices[0].numpy()
            rng = np.random.default_rng((number, keep))
            others = rng.permutation(np.setdiff1d(np.arange(features.hidden.shape[1]), chosen))
            order = rng.permutation(chosen)
            for share in OVERLAPS:
                gone = round((1 - share) * keep)
                indices = torch.from_numpy(np.sort(np.concatenate([order[gone:], others[:gone]])))[None]
                # Both choices hand on plain rows, so that the choice alone differs.
                tokens = features.hidden[:, indices[0]]
                right[keep, share].append(model.right(reading, CUT, (tokens, indices)))
        print(f"{number + 1} of {len(questions.photos)} pictures", end="\r", file=sys.stderr, flush=True)
    rows = [
        {
            "keep": keep,
            "overlap": 1 - round((1 - share) * keep) / keep,
            "accuracy": msgspec.to_builtins(accuracy(answers)),
            "loss": msgspec.to_builtins(difference(right[keep, 1.0], answers)),
        }
        for (keep, share), answers in right.items()
    ]
    result = {
        "command": "python benchmarks/kept_overlap.py",
        "what": f"pocket, cut {CUT}, {questions.questions} questions about {len(questions.photos)} pictures",
        "machine": device_name(),
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
