"""Pocket with another last layer: its answers never end, so that many tokens of them can be looked at, on one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from export.models.pocket import pocket_folder


def talkative(folder: Path) -> Path:
    """Writes the checkpoint into a folder that is not there yet; returns it."""
    shutil.copytree(pocket_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    (name,) = [name for name in weights if name.endswith("lm_head.weight")]
    head = weights[name]
    said = torch.randn(head.shape, generator=torch.Generator().manual_seed(5)) * float(head.float().std())
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for token in range(len(said)):
        text = words.decode([token])
        if not text.isascii() or not text.strip().isalpha():
            said[token] = 0.0  # of all others one is always likelier
    weights[name] = said.to(head.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
