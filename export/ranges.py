"""How large the numbers inside a graph become, and float32 islands for the modules that float16 cannot hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from export.blocks.norms import LayerNorm, Norm
from export.graphs.vision import VisionEncoder
from runtime.bundle import FLOAT16_LARGEST
from runtime.errors import ExportError

# What is measured on a few photos may be this many times larger on another.
SAFETY = 2.0
LARGEST = FLOAT16_LARGEST / SAFETY
# The norms bring their input near 1 by its mean magnitude; the factor is no longer precise above this (2^-14 / 32).
LARGEST_MEAN = 512.0
# A LayerNorm subtracts the mean from numbers that float16 rounded by up to 2^-12 of it: where the mean is this many
# times the deviation, that is 0.8 % of what is left.
LARGEST_OFFSET = 32.0


@dataclass(frozen=True)
class Ranges:
    """The largest absolute number in each module of the `graph`, and the modules whose numbers float16 may not hold."""

    largest: dict[str, float]
    beyond: tuple[str, ...]
    graph: str = "vision graph"

    @property
    def worst(self) -> str:
        """The module with the largest number."""
        return max(self.largest, key=self.largest.__getitem__)

    @property
    def islands(self) -> tuple[str, ...]:
        """The modules that must compute in float32, by their path in the graph.

        Raises ExportError where no island helps, because the numbers between the modules are too large.
        """
        # The innermost first, so that an error names the module where it begins.
        inside_out = sorted(self.beyond, key=lambda name: -name.count("."))
        return tuple(sorted({_island_of(name, self) for name in inside_out}))


class Island(nn.Module):
    """A module that computes in float32 inside a float16 graph, with casts around it."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any) -> Any:
        """What `inside` makes of float32 copies of its inputs, in float16."""
        out = self.inside(*tree_map_only(Tensor, Tensor.float, args))
        return tree_map_only(Tensor, Tensor.half, out)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves these two untyped
    """Notes the largest absolute result of every operator under the module that runs it.

    Not looked at: the pruner, which computes in float32 whatever the rest does, the insides of norms, which scale
    before they square, views, and sums with a mask.
    """

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest: dict[str, float] = {}
        self.norm_inputs: dict[str, float] = {}
        self.offsets: dict[str, float] = {}
        self._running: list[tuple[str, nn.Module]] = []
        self._mask = encoder.mask.data_ptr() if encoder.cut else None
        self.handles = []
        for name, module in encoder.named_modules():
            if name and not name.startswith("pruner"):
                self.handles += [
                    module.register_forward_pre_hook(self._enter(name)),
                    module.register_forward_hook(self._leave, always_call=True),
                ]

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(module, Norm):
                mean = float(args[0].abs().mean(-1).max())
                self.norm_inputs[name] = max(mean, self.norm_inputs.get(name, 0.0))
            if isinstance(module, LayerNorm):
                deviation = (args[0].var(-1, correction=0) + module.epsilon).sqrt()
                offset = float((args[0].mean(-1).abs() / deviation).max())
                self.offsets[name] = max(offset, self.offsets.get(name, 0.0))
            self._running.append((name, module))

        return enter

    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        name, _ = self._running.pop()
        if isinstance(module, Norm):
            self._note(name, out)

    def _note(self, name: str, out: Any) -> None:
        if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
            self.largest[name] = max(_largest_of(out), self.largest.get(name, 0.0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._running and not func.is_view and not isinstance(self._running[-1][1], Norm):
            masked = any(isinstance(arg, Tensor) and arg.data_ptr() == self._mask for arg in args)
            if not masked:
                for one in out if isinstance(out, tuple | list) else (out,):
                    self._note(self._running[-1][0], one)
        return out


@torch.no_grad()
def measure(encoder: VisionEncoder, pixel_values: Iterable[Tensor]) -> Ranges:
    """Runs the float32 `encoder` on each of `pixel_values` (1, C, H, W) and finds what float16 could not hold.

    Raises ExportError for numbers that float32 does not hold either, and for a LayerNorm that would be left with what
    float16 rounded.
    """
    recorder = _Recorder(encoder)
    try:
        with recorder:
            for pixels in pixel_values:
                encoder(pixels)
    finally:
        for handle in recorder.handles:
            handle.remove()
    ranges = _ranges(recorder.largest, recorder.norm_inputs, "vision graph")
    worst = max(recorder.offsets, key=recorder.offsets.__getitem__, default="")  # a tower may have none
    if recorder.offsets.get(worst, 0.0) > LARGEST_OFFSET:
        raise ExportError(
            f"{worst} of the vision graph takes the mean out of numbers whose mean is {recorder.offsets[worst]:.3g} "
            f"times their deviation; float16 would leave little of them (at most {LARGEST_OFFSET:g}): "
            "give --precision fp32"
        )
    return ranges


class Watch:
    """Notes the largest numbers that go into and come out of modules while others run them: of the text graphs.

    Decoder layers of a full-size model never are in memory together, and the desktop's outputs pass through each of
    them anyway. What lies between two modules counts as input of the second; attention scores are not seen.
    """

    def __init__(self) -> None:
        self._largest: dict[str, float] = {}
        self._norm_inputs: dict[str, float] = {}

    def __call__(self, name: str, module: nn.Module) -> None:
        """Looks at every run of `module` and of all within, under their names in the text graphs."""
        for path, part in module.named_modules():
            part.register_forward_hook(self._noting(f"{name}.{path}" if path else name))

    def ranges(self) -> Ranges:
        """What was found. Raises ExportError for numbers that float32 does not hold either."""
        return _ranges(self._largest, self._norm_inputs, "text graphs")

    def _noting(self, name: str) -> Any:
        is_norm = name.rpartition(".")[2].endswith("norm")

        def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            if is_norm:
                mean = float(args[0].abs().mean(-1).max())
                self._norm_inputs[name] = max(mean, self._norm_inputs.get(name, 0.0))
            for one in (*args, *(out if isinstance(out, tuple) else (out,))):
                if isinstance(one, Tensor) and one.is_floating_point():
                    self._largest[name] = max(_largest_of(one), self._largest.get(name, 0.0))

        return note


def _largest_of(values: Tensor) -> float:
    """The largest absolute value; a number that is none compares with nothing and counts as beyond all."""
    low, high = torch.aminmax(values)
    largest = max(-float(low), float(high))
    return largest if largest == largest else float("inf")


def _ranges(largest: dict[str, float], norm_inputs: dict[str, float], graph: str) -> Ranges:
    beyond = {name for name, mean in norm_inputs.items() if mean > LARGEST_MEAN}
    beyond |= {name for name, number in largest.items() if number > LARGEST}
    ranges = Ranges(largest, tuple(sorted(beyond)), graph)
    if not math.isfinite(ranges.largest[ranges.worst]):
        raise ExportError(
            f"{ranges.worst} of the {graph} gives numbers that are NaN or infinite in float32, too: the "
            "checkpoint's weights are damaged or not meant for this model; take others with --weights"
        )
    return ranges


def make_islands(graph: nn.Module, islands: Mapping[str, nn.Module]) -> None:
    """Puts float32 modules in the place of those of a float16 `graph`, by their paths in it."""
    for name, precise in islands.items():
        parent, _, last = name.rpartition(".")
        setattr(graph.get_submodule(parent), last, Island(precise).eval())


def _island_of(name: str, ranges: Ranges) -> str:
    """The smallest module around `name` whose input and output are not themselves what is too large."""
    parts, largest = name.split("."), ranges.largest[name]
    if largest <= LARGEST:
        return name  # a norm, whose input alone is large
    for kind in ("mlp", "self_attn", "projector"):
        if kind in parts:
            return ".".join(parts[: parts.index(kind) + 1])
    raise ExportError(
        f"{name} of the {ranges.graph} reaches {largest:.3g}, float16 holds {FLOAT16_LARGEST:.0f} (with a safety "
        f"factor of {SAFETY:g}), and what it hands on stays as large: no float32 island helps; give --precision fp32"
    )
