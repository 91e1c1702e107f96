"""The tower's training: which shape, colour, pattern and letter is in each patch, in windows and whole pictures."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.model import pocket_model
from training.optimiser import Optimiser
from training.pictures import (
    LARGE_PRINT,
    PRESENCE,
    PRINT,
    THINGS,
    WHOLE_PRINT,
    WHOLE_THINGS,
    batches,
    pixel_values,
)
from training.pictures import presence as presence_of
from training.scenes import GRID, LABELS


class Seer(nn.Module):
    """The tower up to the layer that LLaVA takes its features from, over a window of the grid, with heads on top."""

    def __init__(self, vision: Any, layers: int) -> None:
        super().__init__()
        self.vision = vision
        self.layers = layers
        width = vision.config.hidden_size
        self.norm = nn.LayerNorm(width)
        # Where a patch stands is asked for too: a decoder can say where things are only if features tell.
        self.heads = nn.ModuleList(nn.Linear(width, count) for count in (*LABELS, GRID, GRID))
        self.whole_norm = nn.LayerNorm(width)
        self.whole = nn.Linear(width, PRESENCE)

    def see(self, pixels: Tensor, corners: Tensor) -> Tensor:
        """(B, 3, H, W), (B, 2) -> (B, 1 + h * w, D), the class token first."""
        return see(self.vision, self.layers, pixels, corners)

    def forward(self, pixels: Tensor, corners: Tensor) -> tuple[list[Tensor], Tensor]:
        """(B, 3, H, W), (B, 2) -> logits of each kind of label (B, h * w, classes), and (B, PRESENCE)"""
        return self.told(self.see(pixels, corners))

    def told(self, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        """The logits from what `see` gives."""
        patches = self.norm(hidden[:, 1:])
        return [head(patches) for head in self.heads], self.whole(self.whole_norm(hidden[:, 0]))


def places_of(rows: int, columns: int, corners: Tensor) -> tuple[Tensor, Tensor]:
    """Where the patches of windows stand in the grid: (B, 2) -> rows (B, h, 1) and columns (B, 1, w)."""
    down = torch.arange(rows)[None, :, None] + corners[:, 0, None, None]
    right = torch.arange(columns)[None, None, :] + corners[:, 1, None, None]
    return down, right


def see(vision: Any, layers: int, pixels: Tensor, corners: Tensor) -> Tensor:
    """(B, 3, H, W) of a window whose first patch stands at `corners` of the grid -> (B, 1 + h * w, D)."""
    embeddings = vision.embeddings
    hidden: Tensor = embeddings.patch_embedding(pixels)
    rows, columns = hidden.shape[2:]
    hidden = hidden.flatten(2).transpose(1, 2)
    down, right = places_of(rows, columns, corners)
    places = 1 + (down * GRID + right).flatten(1)
    table = embeddings.position_embedding.weight
    first = (embeddings.class_embedding + table[0]).expand(len(hidden), 1, -1)
    hidden = torch.cat([first, hidden + table[places]], 1)
    hidden = vision.pre_layrnorm(hidden)
    for layer in vision.encoder.layers[:layers]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def loss_of(seen: list[Tensor], whole: Tensor, labels: Tensor, corners: Tensor) -> Tensor:
    """Patches that hold something count as much as all that hold nothing; of a place every patch counts."""
    flat = labels.flatten(1, 2).long()
    total = whole.new_zeros((), dtype=torch.float32)
    *kinds, row, column = seen
    down, right = places_of(labels.shape[1], labels.shape[2], corners)
    for logits, place in ((row, down), (column, right)):
        goal = place.expand(-1, *labels.shape[1:3]).flatten()
        total = total + 0.3 * F.cross_entropy(logits.float().flatten(0, 1), goal)
    for kind, logits in enumerate(kinds):
        goal = flat[..., kind].flatten()
        each = F.cross_entropy(logits.float().flatten(0, 1), goal, reduction="none")
        some = goal > 0
        weight = (1.0, 1.0, 0.5, 1.5, 1.0)[kind]
        total = total + weight * (
            (each * some).sum() / some.sum().clamp(min=1) + 0.6 * (each * ~some).sum() / (~some).sum()
        )
    return total + 0.5 * F.binary_cross_entropy_with_logits(whole.float(), presence_of(labels))


def right_of(seen: list[Tensor], labels: Tensor) -> list[float]:
    """Share of the patches that hold something whose label is found, kind by kind."""
    flat = labels.flatten(1, 2).long()
    out = []
    for kind, logits in enumerate(seen[:-2]):
        goal = flat[..., kind]
        some = goal > 0
        out.append(float((logits.argmax(-1)[some] == goal[some]).float().mean()) if some.any() else math.nan)
    return out


def train_tower(run: Path, *, windows: int, wholes: int, size: int = 32, rate: float = 2e-3) -> None:
    """Trains for `windows` batches of 12 x 12 patches, then for `wholes` of whole pictures; goes on from a stop."""
    torch.manual_seed(1)
    model = pocket_model()
    seer = Seer(model.model.vision_tower, model.config.vision_config.num_hidden_layers - 1)
    steps = windows + wholes
    optimiser = Optimiser(seer, rate=rate, steps=steps)
    state, done = run / "tower.pt", 0
    if state.exists():
        kept = torch.load(state)
        seer.load_state_dict(kept["model"])
        optimiser.load(kept["optimiser"])
        done = kept["step"]
    began, scores = time.time(), []
    while done < steps:
        if done < windows:
            large = done < windows // 5
            stream = batches(
                11,
                done,
                windows // 5 if large else windows,
                size,
                (THINGS, LARGE_PRINT if large else PRINT),
                patches=12,
            )
        else:
            stream = batches(12, done, steps, size // 4, (WHOLE_THINGS, WHOLE_PRINT))
        for batch in stream:
            with torch.autocast("cpu", torch.bfloat16):
                seen, whole = seer(pixel_values(batch.pixels), batch.corners)
                loss = loss_of(seen, whole, batch.labels, batch.corners)
            optimiser.step(loss, done)
            scores.append([loss.item(), *right_of(seen, batch.labels)])
            done += 1
            if done % 50 == 0:
                mean = torch.tensor(scores).nanmean(0).tolist()
                print(
                    f"tower {done}/{steps} loss {mean[0]:.3f} shape {mean[1]:.3f} colour {mean[2]:.3f} "
                    f"fill {mean[3]:.3f} glyph {mean[4]:.3f} centre {mean[5]:.3f} {time.time() - began:.0f} s",
                    flush=True,
                )
                scores = []
            if done % 200 == 0 or done == steps:
                kept = {"model": seer.state_dict(), "optimiser": optimiser.state(), "step": done}
                torch.save(kept, state.with_suffix(".new"))
                state.with_suffix(".new").rename(state)
