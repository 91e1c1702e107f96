"""One optimiser for a whole model: Muon for matrices, AdamW for the rest, one rate that rises and falls."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class Optimiser:
    """Steps of a training whose length is known; `rate` is Muon's highest, AdamW's is the same."""

    def __init__(self, model: nn.Module, *, rate: float, steps: int, warm: int = 100) -> None:
        self.rate, self.steps, self.warm = rate, steps, warm
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        names = {id(p): name for name, p in model.named_parameters()}
        matrices = [
            p
            for p in self.parameters
            if p.dim() == 2 and not any(w in names[id(p)] for w in ("embed", "head", "whole"))
        ]
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.parameters if id(p) not in chosen]
        self.parts: list[Any] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]

    def step(self, loss: Tensor, step: int) -> None:
        """One step down from a loss; the rate rises over `warm` steps and falls along a cosine to a fiftieth."""
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        share = min(1.0, (step + 1) / self.warm)
        fall = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.rate * share * fall
            part.step()
            part.zero_grad(set_to_none=True)

    def state(self) -> list[Any]:
        return [part.state_dict() for part in self.parts]

    def load(self, state: list[Any]) -> None:
        for part, kept in zip(self.parts, state, strict=True):
            part.load_state_dict(kept)
