"""The checkpoint that training ends in: what the table of models says, what transformers reads, what was learnt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from export.checkpoints import FolderCheckpoint
from export.families import MODELS
from training.model import pocket_model
from training.write import write_model


def test_what_was_learnt_is_written(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = pocket_model()
    torch.save({"model": model.state_dict()}, tmp_path / "answers.pt")
    folder = write_model(tmp_path)
    checkpoint = FolderCheckpoint(folder, MODELS["pocket"])
    assert checkpoint.unread() == ()
    embedding = checkpoint.tensor("embed_tokens.weight")
    assert torch.equal(embedding, model.model.language_model.embed_tokens.weight.half())

    from transformers import LlavaForConditionalGeneration

    loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.half()), name
