"""What every exported graph says about itself: its inputs and outputs, by name, in order, with static shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from runtime.bundle import TensorInfo


class Graph(nn.Module):
    """A module with one fixed signature; backends name and shape the exported graph after it.

    `compression` is for backends that quantise by themselves: the scheme, None for none. Where that covers
    activations, `calibration` holds inputs to see them with, and `quantisable` names the child modules it is for.
    """

    compression: str | None = None
    calibration: Sequence[tuple[NDArray[np.generic], ...]] = ()
    quantisable: tuple[str, ...] = ()

    def input_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each input."""
        raise NotImplementedError

    def output_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each output."""
        raise NotImplementedError

    def state_infos(self) -> tuple[TensorInfo, ...]:
        """Name, shape and dtype of each buffer that the graph writes and the engine keeps; most graphs have none."""
        return ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(info.name for info in self.input_infos())

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(info.name for info in self.output_infos())

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Inputs of the right shape from a fixed seed: a photo's range for numbers, zeros for ids and positions."""
        generator = torch.Generator().manual_seed(0)
        return tuple(
            torch.zeros(info.shape, dtype=getattr(torch, info.dtype))
            if info.dtype in ("int64", "int32")
            else torch.randn(info.shape, generator=generator).to(getattr(torch, info.dtype))
            for info in self.input_infos()
        )
