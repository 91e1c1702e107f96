"""The trained model as a checkpoint folder in Hugging Face's layout, in half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from export.models.pocket import settings_files
from training.model import TEXT, VISION, pocket_model
from training.tokenizer import scene_tokenizer

CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "dtype": "float16",
    "image_seq_length": 576,
    "image_token_index": 3,
    "model_type": "llava",
    "multimodal_projector_bias": True,
    "projector_hidden_act": "gelu",
    "text_config": {
        **TEXT,
        "attention_bias": False,
        "hidden_act": "silu",
        "mlp_bias": False,
        "model_type": "llama",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "tie_word_embeddings": False,
    "vision_config": {
        **VISION,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "model_type": "clip_vision_model",
        "num_channels": 3,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def write_model(run: Path) -> Path:
    """Writes what the last stage left in `run` as run/pocket, with its tokenizer; returns that folder."""
    folder = run / "pocket"
    folder.mkdir(parents=True, exist_ok=True)
    model = pocket_model()
    last = next(path for path in (run / "finish.pt", run / "whole.pt", run / "answers.pt") if path.exists())
    model.load_state_dict(torch.load(last)["model"])
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name, data in settings_files(CONFIG, scene_tokenizer(TEXT["vocab_size"])).items():
        (folder / name).write_bytes(data)
    return folder
