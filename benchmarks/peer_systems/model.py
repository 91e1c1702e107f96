"""The one model that all systems of benchmarks/peers.py run, and what they are asked: photo, prompt, question."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    import numpy as np

    from export.families.family import Checkpoint, ModelEntry

MODEL = "llava-1.5-7b"
SEED = 0
# The first layers see every image token; at least one must stand behind the cut.
LEAST_LAYERS, MOST_LAYERS = 3, 32
QUESTION_TOKENS = 20
PIXELS, PHOTO, IDS = "pixels.npy", "photo.rgb", "ids.json"
FEATURES, VALUES = "image features", "values of decoder layer 0"
# What the systems are compared with, by what is compared.
REFERENCES = {FEATURES: "features.npy", VALUES: "values.npy"}


class Asked(NamedTuple):
    """What every system is given: pixel_values (1, 3, H, W) float32, and the ids before and behind the image."""

    pixels: np.ndarray
    prefix: list[int]
    question: list[int]


def entry(layers: int, model: str = MODEL) -> ModelEntry:
    """A model of ours with fewer decoder layers, and under a name of its own."""
    from export.families import MODELS

    whole = MODELS[model]
    return replace(
        whole,
        name=f"{model}-{layers}-layers",
        summary=f"the geometry of {model} with fewer decoder layers",
        hub_id=None,
        config={**whole.config, "text_config": {**whole.config["text_config"], "num_hidden_layers": layers}},
    )


def checkpoint(layers: int) -> Checkpoint:
    """Its weights, which depend on the seed and on the names of the tensors alone."""
    from export.checkpoints import RANDOM, open_checkpoint

    return open_checkpoint(entry(layers), weights=RANDOM, seed=SEED)


def register(layers: int) -> str:
    """Makes the model one that `--model` can name, in this process; returns its name."""
    from export.families import MODELS

    made = entry(layers)
    cast(dict[str, Any], MODELS)[made.name] = made
    return made.name


def operations(layers: int, kept: int, *, cut: int) -> float:
    """Floating-point operations from pixels to the image's whole KV cache when `kept` tokens go on behind the cut.

    Two for a multiplication with its addition; norms, the pruner and the prompt before the image are left out.
    """
    made = entry(layers)
    geometry: Any = made.geometry
    image = geometry.image_tokens

    def products(prefix: str, tokens: int) -> float:
        shapes = (tensor.shape for name, tensor in made.tensors.items() if name.startswith(prefix))
        return 2.0 * tokens * sum(math.prod(shape) for shape in shapes if len(shape) == 2)

    width: int = geometry.text.hidden

    def layer(tokens: int) -> float:
        return products("layers.0.", tokens) + 4.0 * tokens * (made.prefix_tokens + tokens) * width

    tower: float = products("tower.", image) + geometry.tower_layers * 4.0 * image**2 * geometry.vision.hidden
    return tower + cut * layer(image) + (layers - cut) * layer(kept)


def write_inputs(layers: int, folder: Path) -> None:
    """Writes what every system is given, and what transformers' own modules make of it in float32.

    The photo is the crop that CLIP's preprocessor takes, as pixels of three bytes and as pixel_values.
    """
    import numpy as np
    import torch

    from export.calibration import sample_paths
    from export.models.prompt import read_prompt
    from export.request import DEFAULT_PHOTOS
    from runtime.image import load_photo, preprocess

    folder.mkdir(parents=True, exist_ok=True)
    model, weights = entry(layers), checkpoint(layers)
    image = model.family.image(None, model.geometry)
    pixels = preprocess(load_photo(sample_paths(DEFAULT_PHOTOS)[0]), image)
    channels = [pixels[0, i] * image.std[i] + image.mean[i] for i in range(3)]
    rgb = np.rint(np.stack(channels, axis=-1) / image.rescale).astype(np.uint8)
    np.save(folder / PIXELS, pixels)
    (folder / PHOTO).write_bytes(rgb.tobytes())
    chance = np.random.default_rng(1)
    ids = {
        "prefix": list(read_prompt(None, model.geometry, model).prefix_ids),
        "question": chance.integers(3, 30_000, QUESTION_TOKENS).tolist(),
    }
    (folder / IDS).write_text(json.dumps(ids) + "\n")
    desktop = model.family.desktop(weights, "cpu")
    layer: Any = desktop.layer(0)
    with torch.inference_mode():
        features = desktop.see(torch.from_numpy(pixels)).features
        values = layer.self_attn.v_proj(layer.input_layernorm(features))
    np.save(folder / REFERENCES[FEATURES], features[0].numpy())
    np.save(folder / REFERENCES[VALUES], values[0].numpy())


def asked(folder: Path) -> Asked:
    """Reads what `write_inputs` wrote."""
    import numpy as np

    ids = json.loads((folder / IDS).read_text())
    return Asked(np.load(folder / PIXELS), ids["prefix"], ids["question"])


def cosine(folder: Path, compared: str, made: Path) -> float:
    """How near `made`, raw float32 in a file, is to the reference; 1 is equal. ValueError for another size."""
    import numpy as np

    reference = np.load(folder / REFERENCES[compared]).astype(np.float64).ravel()
    values = np.fromfile(made, np.float32).astype(np.float64)
    if values.shape != reference.shape:
        raise ValueError(f"{made} holds {values.size} numbers of the {compared} instead of {reference.size}")
    return float(values @ reference / (np.linalg.norm(values) * np.linalg.norm(reference)))
