"""What families share on the desktop side: filling transformers' own modules from a checkpoint, in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from export.families.family import Checkpoint


def filled(
    module: nn.Module, checkpoint: Checkpoint, device: torch.device | str, canonical: Callable[[str], str]
) -> nn.Module:
    """`module` with the checkpoint's tensors in float32, on `device`; it may have been built on the meta device.

    `canonical` names the tensor of each of the module's parameters. Graphs are filled by other code (export.weights):
    what they are compared with must not share its mistakes.
    """
    state = {name: checkpoint.tensor(canonical(name)).float() for name, _ in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    return module.to(device).eval()


def eager(kind: Any, given: Mapping[str, Any]) -> Any:
    """What transformers' config class `kind` reads of a config.json, with the plain attention that defines arithmetic.

    Raises CheckpointError for what it does not take.
    """
    from huggingface_hub.errors import StrictDataclassError

    try:
        config = kind.from_dict(given)
    except (StrictDataclassError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"config.json: transformers does not take it ({reason}); correct it or download the file again"
        ) from error
    config.vision_config._attn_implementation = config.text_config._attn_implementation = "eager"
    return config


def filled_in_turn(module: nn.Module, fill: Callable[[nn.Module, str], object]) -> nn.Module:
    """`module`, built on the meta device, whose parts are each filled when they run and emptied behind it.

    `fill` is given a part that has parameters of its own, and its path.
    """

    def filling(path: str) -> Any:
        def before(part: nn.Module, _inputs: object) -> None:
            fill(part, path)

        return before

    for path, part in module.named_modules():
        if next(part.parameters(recurse=False), None) is not None:
            part.register_forward_pre_hook(filling(path))
            part.register_forward_hook(lambda part, _inputs, _out: part.to("meta") and None)
    return module.eval()


class DecoderDesktop:
    """The decoder's part of a `Desktop`, by classes of transformers: a layer, a norm, and the rotary embedding.

    Modules are filled when they are asked for, so that memory holds one layer and not the model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device | str,
        config: Any,
        classes: tuple[Any, Any, Any] | None = None,
    ) -> None:
        """`config` is transformers' own of the decoder (see `eager`); without classes they are LLaMA's."""
        from transformers.models.llama import modeling_llama as llama

        usual: tuple[Any, Any, Any] = llama.LlamaDecoderLayer, llama.LlamaRMSNorm, llama.LlamaRotaryEmbedding
        self._layer, self._norm, rotary = classes or usual
        self._checkpoint, self._device, self._decoder = checkpoint, device, config
        self._rotary = rotary(config).to(device)

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for hidden (1, T, D) at positions (1, T)."""
        tables: tuple[Tensor, Tensor] = self._rotary(hidden, position_ids=positions)
        return tables

    def layer(self, index: int) -> nn.Module:
        """A decoder layer."""
        import torch

        with torch.device("meta"):
            layer = self._layer(self._decoder, index)
        return self._filled(layer, f"layers.{index}")

    def norm(self) -> nn.Module:
        """The norm in front of the output matrix."""
        return self._filled(self._norm(self._decoder.hidden_size, eps=self._decoder.rms_norm_eps), "norm")

    def _filled(self, module: nn.Module, prefix: str) -> nn.Module:
        return filled(module, self._checkpoint, self._device, lambda name: f"{prefix}.{name}")


class LayerCache:
    """What transformers' attention asks of a cache, for one layer."""

    def __init__(self, entries: tuple[Tensor, Tensor] | None) -> None:
        self.entries = entries

    def update(self, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last."""
        import torch

        if self.entries is not None:
            key = torch.cat([self.entries[0], key], dim=2)
            value = torch.cat([self.entries[1], value], dim=2)
        self.entries = key, value
        return self.entries
