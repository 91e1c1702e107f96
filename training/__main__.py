"""python -m training: trains the pocket model, from wherever the last run stopped."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def main() -> None:
    """Runs one stage."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("stage", choices=("tower", "answers", "whole", "finish", "write", "held-out"))
    parser.add_argument("--run", type=Path, default=Path("build/training"), help="folder of the checkpoints")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=2500)
    parser.add_argument("--wholes", type=int, default=600)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    asked.run.mkdir(parents=True, exist_ok=True)
    if asked.stage == "tower":
        from training.tower import train_tower

        train_tower(asked.run, windows=asked.windows, wholes=asked.wholes)
    elif asked.stage == "answers":
        from training.answers import train_answers

        train_answers(asked.run)
    elif asked.stage == "whole":
        from training.answers import train_whole

        train_whole(asked.run)
    elif asked.stage == "finish":
        from training.answers import train_finish

        train_finish(asked.run)
    elif asked.stage == "write":
        from training.write import write_model

        print(write_model(asked.run))
    else:
        from training.held_out import write_held_out

        print(write_held_out(asked.run / "pocket-questions"))


main()
