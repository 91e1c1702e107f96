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
