"""Filling modules that were built on the meta device from a checkpoint, at once or with stand-ins to be read late."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from export.families.family import Checkpoint, Family, Geometry
    from runtime.bundle import WeightsInfo


def fill(module: nn.Module, checkpoint: Checkpoint, prefix: str, dtype: torch.dtype) -> None:
    """Replaces every parameter of `module` by the tensor `prefix.<its name>`, cast to `dtype` as it is read.

    What a module makes of a tensor that is stored in another form than it computes with, its `as_read` says: by a
    parameter's name, in words for keys, and as a function of the float32 tensor. At no time more than one tensor exists
    in two dtypes. Out of a `LateCheckpoint` every parameter with two axes or
    more, where nearly all the bytes are, is a stand-in: see `Late`. CheckpointError when a shape differs, or when a
    value does not fit `dtype`.
    """
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            full_name = ".".join(part for part in (prefix, path, name) if part)
            stored = tuple(checkpoint.shape(full_name))
            if stored != tuple(parameter.shape):
                raise CheckpointError(
                    f"{full_name} has shape {list(stored)}, but its place has {list(parameter.shape)}"
                )
            changes: Mapping[str, tuple[str, Change]] = getattr(owner, "as_read", {})
            change = changes.get(name)
            if isinstance(checkpoint, LateCheckpoint) and parameter.dim() > 1:
                setattr(owner, name, _of_checkpoint(checkpoint, full_name, dtype, change).stand_in())
            else:
                setattr(owner, name, nn.Parameter(_read(checkpoint, full_name, dtype, change), requires_grad=False))


def _read(
    checkpoint: Checkpoint, name: str, dtype: torch.dtype, change: tuple[str, Change] | None = None
) -> torch.Tensor:
    stored = checkpoint.tensor(name)
    if change is not None:
        stored = change[1](stored.float())
    cast = stored.to(dtype)
    if dtype == torch.float16 and stored.dtype != torch.float16 and not torch.isfinite(cast).all():
        raise CheckpointError(f"{name} has values beyond the range of float16; use --precision fp32")
    return cast


Change = Callable[[torch.Tensor], torch.Tensor]
Whole = torch.Tensor | Mapping[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Late:
    """A weight that waits in its checkpoint until somebody who writes a program asks for its numbers.

    `key` says which tensor it is and all that is done to it, so that equal keys of one checkpoint mean equal numbers.
    `like` is a tensor without memory of the same shape, dtype and class, or several by their names where the weight
    becomes these. In a module stands a `stand_in`, which can be traced and lowered like the weight itself, but holds no
    number: computing with it gives nonsense.
    """

    key: tuple[str, ...]
    like: Whole
    read: Callable[[], Whole]

    def then(self, step: str, change: Callable[[torch.Tensor], Whole]) -> Late:
        """The same weight with `change` made to it when it is read."""
        return Late((*self.key, step), change(_one(self.like)), lambda: change(_one(self.read())))

    def stand_in(self) -> nn.Parameter:
        """A parameter of the weight's shape, dtype and class, over memory that nobody has touched."""
        parameter = nn.Parameter(_untouched(_one(self.like)), requires_grad=False)
        setattr(parameter, _MARK, (self, None))
        return parameter

    def stand_ins(self) -> dict[str, torch.Tensor]:
        """Tensors for the buffers of a module, by their names, where the weight becomes several."""
        made = {name: _untouched(like) for name, like in parts_of(self.like).items()}
        for name, tensor in made.items():
            setattr(tensor, _MARK, (self, name))
        return made


_MARK = "_pruneport_late"


def _one(whole: Whole) -> torch.Tensor:
    assert isinstance(whole, torch.Tensor)
    return whole


def late(held: torch.Tensor) -> Late | None:
    """The weight that a parameter or buffer of a module stands for; None where it is the weight itself."""
    found: tuple[Late, str | None] | None = getattr(held, _MARK, None)
    return None if found is None else found[0]


def _stand_ins(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor, Late, str | None]]:
    """Every stand-in of a module: its owner, its name there, itself, what it stands for, and which part of that."""
    for owner in module.modules():
        for name, held in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            found: tuple[Late, str | None] | None = getattr(held, _MARK, None)
            if found is not None:
                yield owner, name, held, *found


def read_now(module: nn.Module) -> None:
    """Puts the weights themselves where a module has stand-ins."""
    waiting = Waiting()
    waiting.expect(module)
    for owner, name, held, found, part in _stand_ins(module):
        if part is None:
            setattr(owner, name, nn.Parameter(_one(found.read()), requires_grad=False))
        else:
            setattr(owner, name, waiting.numbers(held))


def parts_of(whole: Whole) -> Mapping[str, torch.Tensor]:
    """The plain tensors that a weight is made of, by their names in it; a plain one is its own part."""
    if not isinstance(whole, torch.Tensor):
        return whole
    if not hasattr(whole, "__tensor_flatten__"):
        return {"": whole}
    names, _ = whole.__tensor_flatten__()
    return {name: getattr(whole, name) for name in names}


class Waiting:
    """The weights that programs wait for which were traced with stand-ins, those of the graphs that this was shown.

    `numbers` reads one; the last that was read is kept, because one that became several tensors is asked for in parts.
    """

    def __init__(self) -> None:
        # By the address of its memory, which a stand-in keeps through tracing and lowering; held, so that it stays so.
        self._waiting: dict[int, tuple[Late, str, torch.Tensor]] = {}
        self._last: tuple[tuple[str, ...], Mapping[str, torch.Tensor]] | None = None

    def expect(self, graph: nn.Module) -> None:
        """Remembers what the stand-ins of a graph stand for."""
        for _, _, held, found, part in _stand_ins(graph):
            tensors = parts_of(held.data) if part is None else {part: held}
            for name, tensor in tensors.items():
                self._waiting[tensor.data_ptr()] = found, name, tensor

    def key(self, tensor: torch.Tensor) -> tuple[str, ...] | None:
        """Names the weight that a tensor of a traced program stands for; None where it is none of them."""
        found = self._found(tensor)
        return None if found is None else (*found[0].key, found[1])

    def numbers(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weight that a tensor of a traced program stands for, or the tensor itself.

        CheckpointError where it cannot be read.
        """
        found = self._found(tensor)
        if found is None:
            return tensor
        waiting, part = found
        if self._last is None or self._last[0] != waiting.key:
            self._last = None  # before the next is read
            self._last = waiting.key, parts_of(waiting.read())
        read = self._last[1][part]
        if read.shape != tensor.shape or read.dtype != tensor.dtype:
            raise AssertionError(
                f"{waiting.key} was read as {list(read.shape)} {read.dtype}, but traced as {list(tensor.shape)} "
                f"{tensor.dtype}"
            )
        return read

    def forget(self) -> None:
        """Lets go of the weight that was read last."""
        self._last = None

    def _found(self, tensor: torch.Tensor) -> tuple[Late, str] | None:
        # A tensor that only says what a result would be like has no address.
        if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.device.type != "cpu":
            return None
        found = self._waiting.get(tensor.data_ptr())
        return None if found is None else found[:2]


def _untouched(like: torch.Tensor) -> torch.Tensor:
    if hasattr(like, "__tensor_flatten__"):
        names, settings = like.__tensor_flatten__()
        inner = {name: _untouched(getattr(like, name)) for name in names}
        kind: Any = type(like)
        rebuilt: torch.Tensor = kind.__tensor_unflatten__(inner, settings, like.shape, like.stride())
        return rebuilt
    # Pages of their own, which take no memory before somebody touches them; the allocator might hand out used ones.
    pages = mmap.mmap(-1, max(1, like.numel() * like.element_size()))
    return torch.frombuffer(pages, dtype=like.dtype, count=like.numel()).view(like.shape)


def _of_checkpoint(
    checkpoint: LateCheckpoint, name: str, dtype: torch.dtype, change: tuple[str, Change] | None
) -> Late:
    like = torch.empty(checkpoint.shape(name), dtype=dtype, device="meta")
    if change is None:
        return Late((name, str(dtype)), like, lambda: _read(checkpoint, name, dtype))
    words, made = change
    return Late((name, words, str(dtype)), made(like), lambda: _read(checkpoint, name, dtype, change))


def at_once(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint that fills modules with numbers, for who computes with them."""
    return checkpoint.source if isinstance(checkpoint, LateCheckpoint) else checkpoint


class Followed:
    """A checkpoint that tells `seen` how many numbers each tensor has that was read; rows do not count."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.seen: Callable[[int], None] = lambda count: None

    @property
    def family(self) -> Family[Any]:
        """The architecture that the weights are for."""
        return self.source.family

    @property
    def config(self) -> Mapping[str, Any]:
        """The Hugging Face config.json."""
        return self.source.config

    @property
    def geometry(self) -> Geometry:
        """The sizes that config describes."""
        return self.source.geometry

    @property
    def folder(self) -> Path | None:
        """Where the checkpoint lies."""
        return self.source.folder

    def names(self) -> tuple[str, ...]:
        """Canonical names of all tensors."""
        return self.source.names()

    def has(self, name: str) -> bool:
        """Whether a tensor of that canonical name exists."""
        return self.source.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading it."""
        return self.source.shape(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, now."""
        read = self.source.tensor(name)
        self.seen(read.numel())
        return read

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        """Reads a few rows of a matrix, now."""
        return self.source.rows(name, indices)

    def unread(self) -> tuple[str, ...]:
        """Names of stored tensors that belong to none of the model's parts."""
        return self.source.unread()

    def identity(self) -> WeightsInfo:
        """Where the weights came from, with a hash over all of them."""
        return self.source.identity()


class LateCheckpoint(Followed):
    """A checkpoint whose tensors fill modules with stand-ins: for backends that read a weight when they write it."""
