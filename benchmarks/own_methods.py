"""What was tried for a method of our own, in answers: the figures behind `standout`.

    python benchmarks/own_methods.py [--photos 60]

Asks the desktop model about scenes of another seed than the held-out ones, with what each candidate keeps of a scene.
All take the hidden states in front of layer 2 and no question. Those written here differ from `standout` in what their
name says; they are plain loops, and none is a graph.

    keep       image tokens that stay
    accuracy   share of right answers, with its 95 % interval
    loss       how much less that is than with the whole image, with its 95 % interval
    gain       how much more it is than with VLM-Pruner's tokens, as many, with its 95 % interval

Writes benchmarks/results/own_methods.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from torch import Tensor

RESULT = ROOT / "benchmarks/results/own_methods.json"
SEED = 555
CUT = 2
KEEPS = (64, 32)
REFERENCES = ("vlm-pruner", "divprune", "standout")
Choose = Callable[["Tensor", int], "Sequence[int]"]


def away_from_mean(hidden: Tensor) -> Tensor:
    """(N, D) -> (N,): how far each token is from the mean, in shares of the average."""
    away = (hidden - hidden.mean(0)).norm(dim=1)
    shares: Tensor = away / away.mean()
    return shares


def cosines(tokens: Tensor) -> Tensor:
    """(N, D) -> (N, N)"""
    units = tokens / tokens.norm(dim=1, keepdim=True)
    similar: Tensor = units @ units.T
    return similar


def grid_distances(side: int = 24) -> Tensor:
    """(N, N): how far tokens lie from each other, in shares of the grid's diagonal."""
    import torch

    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2).float()
    apart: Tensor = torch.cdist(at, at)
    return apart / apart.max()


def farthest(distance: Tensor, weight: Tensor, keep: int) -> list[int]:
    """One after another, the token whose weight times distance from all chosen ones is largest."""
    import torch

    order = [int(weight.argmax())]
    nearest = distance[order[0]]
    while len(order) < keep:
        score = weight * nearest
        score[order] = -1.0
        order.append(int(score.argmax()))
        nearest = torch.minimum(nearest, distance[order[-1]])
    return order


def by_weight(hidden: Tensor, keep: int, power: float = 0.5) -> list[int]:
    """The weight to another power than a half."""
    return farthest(1 - cosines(hidden), away_from_mean(hidden) ** power, keep)


def by_euclid(hidden: Tensor, keep: int) -> list[int]:
    """Distances between hidden states themselves."""
    import torch

    return farthest(torch.cdist(hidden, hidden), away_from_mean(hidden) ** 0.5, keep)


def by_place(hidden: Tensor, keep: int, stretch: float) -> list[int]:
    """Distances stretched by how far tokens lie from each other."""
    distance = (1 - cosines(hidden)) * (1 + stretch * grid_distances())
    return farthest(distance, away_from_mean(hidden) ** 0.5, keep)


def by_determinant(hidden: Tensor, keep: int, width: float) -> list[int]:
    """Greedily, the largest determinant of exp(-distance / width) between weighted tokens."""
    import torch

    weight = away_from_mean(hidden)
    kernel = weight[:, None] * torch.exp((cosines(hidden) - 1) / width) * weight
    left, rows = kernel.diagonal().clone(), torch.zeros(keep, len(hidden))
    order: list[int] = []
    for step in range(keep):
        score = left.clone()
        score[order] = -1.0
        best = int(score.argmax())
        rows[step] = (kernel[best] - rows[:step, best] @ rows[:step]) / left[best].clamp(min=1e-12).sqrt()
        left = (left - rows[step] ** 2).clamp(min=1e-12)
        order.append(best)
    return order


def by_cover(hidden: Tensor, keep: int) -> list[int]:
    """Greedily, the tokens that all tokens are most similar to (facility location)."""
    import torch

    similar = cosines(hidden)
    covered = similar.min(1).values
    order: list[int] = []
    for _ in range(keep):
        gain = (similar - covered[:, None]).clamp(min=0).sum(0)
        gain[order] = -1.0
        order.append(int(gain.argmax()))
        covered = torch.maximum(covered, similar[:, order[-1]])
    return order


# Name -> how tokens are chosen, and the share of a kept token that recovery replaces.
CANDIDATES: Mapping[str, tuple[Choose, float]] = {
    "weight to the power 0": (partial(by_weight, power=0.0), 0.5),
    "weight to the power 1": (partial(by_weight, power=1.0), 0.5),
    "weight to the power 1.5": (partial(by_weight, power=1.5), 0.5),
    "recovery 0": (by_weight, 0.0),
    "recovery 0.3": (by_weight, 0.3),
    "recovery 0.7": (by_weight, 0.7),
    "distances between hidden states": (by_euclid, 0.5),
    "distances stretched by the grid, 0.3": (partial(by_place, stretch=0.3), 0.5),
    "distances stretched by the grid, 2": (partial(by_place, stretch=2.0), 0.5),
    "determinant, width 0.3": (partial(by_determinant, width=0.3), 0.5),
    "determinant, width 0.1": (partial(by_determinant, width=0.1), 0.5),
    "facility location": (by_cover, 0.5),
}


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=60)
    options = parser.parse_args()

    import msgspec
    import torch

    from export.checkpoints import open_checkpoint
    from export.evaluation.eager import EagerModel
    from export.evaluation.questions import read_questions
    from export.evaluation.scores import accuracy, difference
    from export.models.pocket import POCKET
    from pruning import METHODS, PruneSpec
    from pruning.recovery import recovered
    from runtime.image import load_photo
    from runtime.latency import device_name
    from training.held_out import write_held_out

    model = EagerModel(open_checkpoint(POCKET), POCKET)
    right: dict[tuple[str, int], list[list[bool]]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        questions = read_questions(write_held_out(Path(folder), photos=options.photos, seed=SEED))
        for number, photo in enumerate(questions.photos):
            reading = model.read(load_photo(photo.photo), photo.lines, (0, CUT))
            features = reading.features[CUT]
            right.setdefault(("the whole image", features.hidden.shape[1]), []).append(model.right(reading, 0, None))
            hidden = features.hidden[0].double()
            for keep in KEEPS:
                for name in REFERENCES:
                    trace = METHODS[name].choose(features, PruneSpec(grid=model.grid, keep=keep, method=name))
                    kept = trace.tokens, trace.indices
                    right.setdefault((name, keep), []).append(model.right(reading, CUT, kept))
                for name, (choose, share) in CANDIDATES.items():
                    indices = torch.tensor(sorted(choose(hidden, keep)))
                    tokens = recovered(cosines(hidden), hidden, indices, share)
                    kept = tokens.float()[None], indices[None]
                    right.setdefault((name, keep), []).append(model.right(reading, CUT, kept))
            print(f"{number + 1} of {len(questions.photos)} pictures", end="\r", file=sys.stderr, flush=True)
        count = questions.questions
    whole = next(answers for (name, _), answers in right.items() if name == "the whole image")
    result = {
        "command": "python benchmarks/own_methods.py",
        "what": f"pocket, cut {CUT}, {count} questions about {options.photos} scenes of seed {SEED}",
        "machine": device_name(),
        "rows": [
            {
                "method": name,
                "keep": keep,
                "accuracy": msgspec.to_builtins(accuracy(answers)),
                "loss": msgspec.to_builtins(difference(whole, answers)),
                "gain": msgspec.to_builtins(difference(answers, right["vlm-pruner", keep])) if keep in KEEPS else None,
            }
            for (name, keep), answers in right.items()
        ],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
