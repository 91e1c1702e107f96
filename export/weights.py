"""Filling modules that were built on the meta device, one tensor at a time, straight from a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from export.families.family import Checkpoint


def fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, dtype: torch.dtype) -> None:
    """Replaces every parameter of `module` by the tensor `prefix.<its name>`, cast to `dtype` as it is read.

    At no time more than one tensor exists in two dtypes. CheckpointError when a shape differs, or when a value does
    not fit `dtype`.
    """
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            full_name = ".".join(part for part in (prefix, path, name) if part)
            stored = checkpoint.tensor(full_name)
            if stored.shape != parameter.shape:
                raise CheckpointError(
                    f"{full_name} has shape {list(stored.shape)}, but its place has {list(parameter.shape)}"
                )
            cast = stored.to(dtype)
            if dtype == torch.float16 and stored.dtype != torch.float16 and not torch.isfinite(cast).all():
                raise CheckpointError(f"{full_name} has values beyond the range of float16; use --precision fp32")
            setattr(owner, name, nn.Parameter(cast, requires_grad=False))
