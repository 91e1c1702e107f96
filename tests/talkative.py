"""Pocket with another last layer: its answers never end, so that many tokens of them can be looked at."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from export.models.pocket import pocket_folder


def talkative(folder: Path) -> Path:
    """Writes the checkpoint into a folder that is not there yet; returns it."""
    shutil.copytree(pocket_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("lm_head.weight")]
    head = weights[name]
    said = torch.randn(head.shape, generator=torch.Generator().manual_seed(5)) * float(head.float().std())
    said[:4] = 0.0  # what is special: of all other tokens one is always likelier
    weights[name] = said.to(head.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
