"""Golden outputs of the vision subgraph, made on the desktop by transformers' own modules and the paper's loop.

Nothing here touches export.graphs: what the exported graph is compared with must not share its mistakes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from export.models.llava import ModelEntry, prompt_info
from runtime.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from export.checkpoints import Checkpoint
    from pruning import PruneSpec

_GRAPH = "vision_encoder"


def golden_device() -> str:
    """The best desktop device at hand: "cuda", else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def make_golden(
    checkpoint: Checkpoint,
    entry: ModelEntry,
    spec: PruneSpec | None,
    *,
    placement: str,
    layer: int = 2,
    pixel_values: NDArray[np.float32],
    device: str = "cpu",
) -> dict[str, NDArray[Any]]:
    """Inputs and outputs of the vision subgraph in float32, by the names the bundle stores them under.

    `vision_encoder.in.pixel_values` (1, 3, H, W), `vision_encoder.out.<name>` for each output, and with a spec that
    prunes `kept_indices` (keep,) ascending, `kept_order` (keep,) in the order of selection, `kept_margin` (keep,) how
    near each choice was to going the other way, and `pivots`. Modules are filled and dropped one layer at a time, so
    that memory holds one layer and not the model. ExportError for a placement or image that does not fit.
    """
    import torch

    side = checkpoint.geometry.vision.image_size
    if pixel_values.shape != (1, checkpoint.geometry.vision.channels, side, side):
        raise ExportError(f"pixel_values must have shape (1, 3, {side}, {side}), got {pixel_values.shape}")
    with torch.no_grad(), _exact_float32():
        pixels = torch.from_numpy(np.array(pixel_values, dtype=np.float32)).to(device)
        config = _eager_config(checkpoint)
        features, tower_keys = _run_tower(config.vision_config, checkpoint, pixels)
        image = _run_projector(config, checkpoint, features)
        if placement == "projector":
            outputs, kept = _at_projector(tower_keys, image, spec)
        elif placement == "decoder":
            prefix_ids = prompt_info(checkpoint, entry).prefix_ids
            outputs, kept = _in_decoder(config.text_config, checkpoint, prefix_ids, image, spec, layer)
        else:
            raise ExportError(f"placement {placement!r} is not known; allowed: decoder, projector")
    golden = {f"{_GRAPH}.in.pixel_values": pixels}
    if kept:
        outputs["filled"] = torch.zeros(1, 1)  # the paper's loop runs until it has enough: nothing to fill up
    golden |= {f"{_GRAPH}.out.{name}": tensor for name, tensor in outputs.items()}
    golden |= kept
    return {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in golden.items()}


@contextmanager
def _exact_float32() -> Iterator[None]:
    """On CUDA, real float32 products instead of TF32, whose 10-bit mantissa would reorder the selection."""
    import torch

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _eager_config(checkpoint: Checkpoint) -> Any:
    """transformers' own reading of config.json, with the plain attention whose arithmetic is the definition."""
    from transformers import LlavaConfig

    config: Any = LlavaConfig.from_dict(dict(checkpoint.config))
    config.vision_config._attn_implementation = config.text_config._attn_implementation = "eager"
    return config


def _filled(module: nn.Module, checkpoint: Checkpoint, prefix: str, device: torch.device) -> nn.Module:
    """`module` with the checkpoint's tensors in float32, on `device`; it may have been built on the meta device."""
    state = {name: checkpoint.tensor(f"{prefix}.{name}").float() for name, _ in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    return module.to(device).eval()


def _run_tower(config: Any, checkpoint: Checkpoint, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 3, H, W) -> features (1, N, D), keys (1, N, D) of the last layer run; the class token dropped from both."""
    import torch
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

    embeddings = _filled(CLIPVisionEmbeddings(config), checkpoint, "vision_tower.embeddings", pixels.device)
    norm = torch.nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, device="meta")
    hidden = _filled(norm, checkpoint, "vision_tower.pre_layrnorm", pixels.device)(embeddings(pixels))
    keys: list[Tensor] = []
    for index in range(checkpoint.geometry.tower_layers):
        with torch.device("meta"):
            layer = CLIPEncoderLayer(config)
        _filled(layer, checkpoint, f"vision_tower.encoder.layers.{index}", pixels.device)
        layer.self_attn.k_proj.register_forward_hook(lambda _module, _inputs, output: keys.append(output))
        hidden = layer(hidden, None)
        del keys[:-1]
    return hidden[:, 1:], keys[0][:, 1:]


def _run_projector(config: Any, checkpoint: Checkpoint, features: Tensor) -> Tensor:
    """(1, N, Dv) -> (1, N, D)"""
    import torch
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    with torch.device("meta"):
        projector = LlavaMultiModalProjector(config)
    image: Tensor = _filled(projector, checkpoint, "multi_modal_projector", features.device)(features)
    return image


def _at_projector(keys: Tensor, image: Tensor, spec: PruneSpec | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tokens, indices, kept = _pruned(keys, image, spec)
    return {"image_features": tokens, "kept_indices": indices}, kept


def _in_decoder(
    config: Any,
    checkpoint: Checkpoint,
    prefix_ids: Sequence[int],
    image: Tensor,
    spec: PruneSpec | None,
    layers: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs prefix and image together through the first decoder layers, as transformers does, then prunes."""
    import torch
    from transformers import DynamicCache
    from transformers.masking_utils import create_causal_mask
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    prefix = checkpoint.rows("language_model.embed_tokens.weight", prefix_ids).float().to(image.device)
    hidden = torch.cat([prefix[None], image], dim=1)
    first, length = len(prefix_ids), hidden.shape[1]
    positions = torch.arange(length, device=image.device)[None]
    cache: Any = DynamicCache(config=config)
    mask = create_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=cache, position_ids=positions
    )
    rotary = LlamaRotaryEmbedding(config).to(image.device)(hidden, position_ids=positions)
    outputs: dict[str, Tensor] = {}
    keys = hidden
    for index in range(layers):
        with torch.device("meta"):
            layer = LlamaDecoderLayer(config, index)
        _filled(layer, checkpoint, f"language_model.layers.{index}", image.device)
        hidden = layer(
            hidden, attention_mask=mask, position_ids=positions, past_key_values=cache, position_embeddings=rotary
        )
        outputs[f"key_{index}"], outputs[f"value_{index}"] = cache.layers[index].keys, cache.layers[index].values
        keys = outputs[f"key_{index}"][0, :, first:].transpose(0, 1).reshape(1, length - first, -1)
    tokens, indices, kept = _pruned(keys, hidden[:, first:], spec)
    states = {
        "hidden": torch.cat([hidden[:, :first], tokens], dim=1),
        "positions": torch.cat([positions[:, :first], indices + first], dim=1),
    }
    return states | outputs, kept


def _pruned(keys: Tensor, hidden: Tensor, spec: PruneSpec | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """tokens (1, keep, D), indices (1, keep), and the trace of the selection without its batch dimension."""
    import torch

    count = hidden.shape[1]
    if spec is None or spec.keep == count:
        return hidden, torch.arange(count, device=hidden.device)[None], {}
    from pruning import reference

    # The loop is a definition, not a kernel: it runs on the CPU, on features from whatever device made them.
    trace = reference.trace(keys.cpu(), hidden.cpu(), spec)
    kept = {
        "kept_indices": trace.indices[0],
        "kept_order": trace.order[0],
        "kept_margin": trace.margin[0],
        "pivots": trace.pivots[0],
    }
    return trace.tokens.to(hidden.device), trace.indices.to(hidden.device), kept
