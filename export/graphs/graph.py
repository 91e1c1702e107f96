"""What every exported graph says about itself: its inputs and outputs, by name, in order, with static shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

    def open_axes(self) -> Mapping[str, Mapping[int, str]]:
        """Names of the axes that may have any length from 1 on, by input; those of one name have one length."""
        return {}

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in order."""
        return tuple(info.name for info in self.input_infos())

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return tuple(info.name for info in self.output_infos())

    def example_inputs(self) -> tuple[Tensor, ...]:
        """Inputs of the right shape from a fixed seed: a photo's range for numbers, zeros for ids and positions.

        Open axes are short, and as long as no other one, lest a tracer takes two of them for one.
        """
        generator = torch.Generator().manual_seed(0)
        axes = self.open_axes()
        lengths = {
            name: 3 + 2 * number
            for number, name in enumerate(sorted({name for named in axes.values() for name in named.values()}))
        }
        inputs = []
        for info in self.input_infos():
            named = axes.get(info.name, {})
            shape = [min(size, lengths[named[axis]]) if axis in named else size for axis, size in enumerate(info.shape)]
            dtype = getattr(torch, info.dtype)
            whole = info.dtype in ("int64", "int32")
            inputs.append(
                torch.zeros(shape, dtype=dtype) if whole else torch.randn(shape, generator=generator).to(dtype)
            )
        return tuple(inputs)


class Parts(Mapping[str, Graph]):
    """Graphs in parts of which only one is in memory: each is built, its weights read, when somebody comes to it.

    A part is the names of its graphs and what makes them, by these names. Whoever goes through all graphs once, in
    their order, has each part built once.
    """

    def __init__(self, parts: Sequence[tuple[tuple[str, ...], Callable[[], Mapping[str, Graph]]]]) -> None:
        self._parts = tuple(parts)
        self._at: int | None = None
        self._held: Mapping[str, Graph] = {}

    def split(self, first: int) -> tuple[Parts, Parts]:
        """So many parts from the front, and those behind them."""
        return Parts(self._parts[:first]), Parts(self._parts[first:])

    def __getitem__(self, name: str) -> Graph:
        number = next((n for n, (names, _) in enumerate(self._parts) if name in names), None)
        if number is None:
            raise KeyError(name)
        if number != self._at:
            self._held, self._at = {}, None  # before the next is read
            self._held, self._at = self._parts[number][1](), number
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter([name for names, _ in self._parts for name in names])

    def __len__(self) -> int:
        return sum(len(names) for names, _ in self._parts)
