"""transformers' side of benchmarks/peers.py: LlavaForConditionalGeneration with a DynamicCache, eager PyTorch, sdpa.

transformers_worker.py INPUTS LAYERS bf16|fp32 THREADS NEW_TOKENS
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_systems import model
from benchmarks.peer_systems.worker import serve

if TYPE_CHECKING:
    import numpy as np
    import torch

TYPES = {"bf16": "bfloat16", "fp32": "float32"}


class Transformers:
    """The model with its weights, and the prompt's prefix in the cache."""

    def __init__(self, layers: int, dtype: torch.dtype, asked: model.Asked, *, new_tokens: int) -> None:
        import torch
        from transformers import DynamicCache

        self._model = _filled(layers, dtype)
        self._pixels = torch.from_numpy(asked.pixels).to(dtype)
        self._question = torch.tensor([asked.question])
        self._new_tokens = new_tokens
        self._cache = DynamicCache()
        self._prefix = len(asked.prefix)
        with torch.inference_mode():
            self._decode(input_ids=torch.tensor([asked.prefix]))

    def check(self) -> tuple[str, np.ndarray]:
        """The image features (N, D)."""
        import torch

        with torch.inference_mode():
            return model.FEATURES, self._features()[0].float().numpy()

    def run(self) -> dict[str, Any]:
        """Milliseconds of everything, once."""
        import torch

        with torch.inference_mode():
            self._cache.crop(self._prefix - self._cache.get_seq_length())
            start = time.perf_counter()
            features = self._features()
            encode_ms = _since(start)
            self._decode(inputs_embeds=features)
            ready_ms = _since(start)
            start = time.perf_counter()
            token = self._next(self._question)
            first_ms = _since(start)
            token_ms = []
            for _ in range(self._new_tokens):
                start = time.perf_counter()
                token = self._next(token)
                token_ms.append(_since(start))
        return {
            "encode_ms": encode_ms,
            "image_ready_ms": ready_ms,
            "ttft_question_ms": first_ms,
            "token_ms": token_ms,
        }

    def _features(self) -> torch.Tensor:
        config = self._model.config
        seen = self._model.model.get_image_features(
            pixel_values=self._pixels,
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        (features,) = seen.pooler_output
        return features[None]  # type: ignore[no-any-return]

    def _decode(self, **inputs: torch.Tensor) -> torch.Tensor:
        """The last layer's output; keys and values go into the cache."""
        made = self._model.model.language_model(**inputs, past_key_values=self._cache, use_cache=True)
        return made.last_hidden_state  # type: ignore[no-any-return]

    def _next(self, ids: torch.Tensor) -> torch.Tensor:
        """The likeliest token (1, 1) behind `ids`."""
        logits = self._model.lm_head(self._decode(input_ids=ids)[:, -1:])
        return logits.argmax(-1)  # type: ignore[no-any-return]


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _filled(layers: int, dtype: torch.dtype) -> Any:
    """transformers' model with the seeded weights; SystemExit for one that has a parameter they do not name."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.initialization import no_init_weights

    weights = model.checkpoint(layers)
    canonical = {alias: name for name, tensor in model.entry(layers).tensors.items() for alias in tensor.stored}
    torch.set_default_dtype(dtype)
    with no_init_weights():
        made: Any = LlavaForConditionalGeneration(LlavaConfig.from_dict(dict(weights.config)))
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name not in canonical:
                raise SystemExit(f"transformers' {name} is none of the model's tensors")
            parameter.copy_(weights.tensor(canonical[name]))
    return made.eval()


def main() -> None:
    """Fills the model and answers."""
    inputs, layers, name, threads, new_tokens = sys.argv[1:]
    import torch

    torch.set_num_threads(int(threads))
    peer = Transformers(int(layers), getattr(torch, TYPES[name]), model.asked(Path(inputs)), new_tokens=int(new_tokens))
    serve(peer, {package: version(package) for package in ("torch", "transformers")})


if __name__ == "__main__":
    main()
