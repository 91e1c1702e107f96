"""Batches of rendered scenes as tensors, in a fixed order, made by a process beside the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from export.families.llava.preprocessor import CLIP_MEAN, CLIP_STD
from training.scenes import GLYPHS, GRID, Mixture, Scene, make_scene

# Windows and whole pictures that are full of things, and ones that are full of print.
THINGS = Mixture(things=(3, 8), signs=(0, 1))
PRINT = Mixture(things=(0, 2), signs=(5, 11), letters=0.85)
LARGE_PRINT = Mixture(things=(0, 2), signs=(4, 9), letters=0.85, height=(26, 44))
WHOLE_THINGS = Mixture(things=(6, 16), signs=(0, 2))
WHOLE_PRINT = Mixture(things=(0, 8), signs=(10, 24), letters=0.85, height=(16, 42))


class Batch(NamedTuple):
    """pixels (B, H, W, 3) uint8, labels (B, h, w, 5) uint8, corners (B, 2) int64."""

    pixels: Tensor
    labels: Tensor
    corners: Tensor


class _Scenes(Dataset[Batch]):
    def __init__(self, seed: int, first: int, steps: int, size: int, mixtures: Sequence[Mixture], patches: int) -> None:
        self.seed, self.first, self.steps = seed, first, steps
        self.size, self.mixtures, self.patches = size, mixtures, patches

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, step: int) -> Batch:
        at = (self.first + step) * self.size
        scenes: list[Scene] = [
            make_scene((self.seed, at + i), self.mixtures[i % len(self.mixtures)], patches=self.patches)
            for i in range(self.size)
        ]
        return Batch(
            torch.from_numpy(np.stack([scene.pixels for scene in scenes])),
            torch.from_numpy(np.stack([scene.labels for scene in scenes])),
            torch.tensor([scene.corner for scene in scenes]),
        )


def batches(
    seed: int, first: int, steps: int, size: int, mixtures: Sequence[Mixture], *, patches: int = GRID
) -> Iterator[Batch]:
    """Batches number `first` to `steps` of a seed; the same ones whoever asks, and from wherever a run goes on."""
    scenes = _Scenes(seed, first, steps, size, mixtures, patches)
    return iter(DataLoader(scenes, batch_size=None, num_workers=1, prefetch_factor=4))


def pixel_values(pixels: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32, normalised as CLIP's preprocessor does it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def presence(labels: Tensor) -> Tensor:
    """(B, h, w, 5) -> (B, shapes + colours + glyphs) float32: whether each is anywhere in the picture."""
    from training.scenes import LABELS

    flat = labels.flatten(1, 2).long()
    seen = []
    for column in (0, 1, 3):
        one = torch.zeros(len(flat), LABELS[column])
        one.scatter_(1, flat[..., column], 1.0)
        seen.append(one[:, 1:])
    return torch.cat(seen, 1)


PRESENCE = 6 + 8 + len(GLYPHS)
