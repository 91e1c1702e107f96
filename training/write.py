"""The trained model as a checkpoint folder in Hugging Face's layout, in half precision."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from export.families.llava.preprocessor import clip_preprocessor
from export.models.pocket import POCKET
from training.model import TEXT, pocket_model
from training.tokenizer import TEMPLATE, scene_tokenizer


def write_model(run: Path) -> Path:
    """Writes what the last stage left in `run` as run/pocket, with its tokenizer; returns that folder."""
    folder = run / "pocket"
    folder.mkdir(parents=True, exist_ok=True)
    model = pocket_model()
    last = next(path for path in (run / "finish.pt", run / "whole.pt", run / "answers.pt") if path.exists())
    model.load_state_dict(torch.load(last)["model"])
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name, data in settings_files(POCKET.config, scene_tokenizer(TEXT["vocab_size"])).items():
        (folder / name).write_bytes(data)
    return folder


def settings_files(config: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, bytes]:
    """All files of a checkpoint of this kind but the weights, by name."""
    return {
        "config.json": _json(config),
        "preprocessor_config.json": _json({**clip_preprocessor(336), "processor_class": "LlavaProcessor"}),
        "processor_config.json": _json(
            {
                "image_token": "<image>",
                "num_additional_image_tokens": 1,
                "patch_size": 14,
                "processor_class": "LlavaProcessor",
                "vision_feature_select_strategy": "default",
            }
        ),
        "tokenizer.json": _json(tokenizer),
        "tokenizer_config.json": _json(
            {
                "bos_token": "<s>",
                "clean_up_tokenization_spaces": False,
                "eos_token": "</s>",
                "model_max_length": 2048,
                "pad_token": "<pad>",
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        ),
        "chat_template.jinja": TEMPLATE.encode(),
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
