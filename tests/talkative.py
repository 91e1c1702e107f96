"""Pocket with a decoder from a seed: answers never end, so that many tokens of them can be looked at, on one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from export.models.pocket import pocket_folder

# What each part adds to the residual stream stays small enough that the photo and the last word survive.
GAINS = {"q_proj": 1.3, "k_proj": 1.3, "o_proj": 0.35, "down_proj": 0.7}


def talkative(folder: Path) -> Path:
    """Writes the checkpoint into a folder that is not there yet; returns it."""
    shutil.copytree(pocket_folder(), folder)
    weights = load_file(folder / "model.safetensors")
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    chance = torch.Generator().manual_seed(5)
    for name, value in sorted(weights.items()):
        if "language_model" not in name:
            continue
        if value.dim() == 1:
            made = torch.ones(value.shape)
        else:
            spread = 1.0 if "embed_tokens" in name else value.shape[1] ** -0.5
            made = torch.randn(value.shape, generator=chance) * spread * GAINS.get(name.split(".")[-2], 1.0)
        if name.endswith("lm_head.weight"):
            for token in range(len(made)):
                text = words.decode([token])
                if not text.isascii() or not text.strip().isalpha():
                    made[token] = 0.0  # of all others one is always likelier
        weights[name] = made.to(value.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
