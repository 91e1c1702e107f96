"""A device that computes on the CPU and refuses what a GPU would refuse: operators that mix it with the CPU.

`register()` makes it known to torch as "pretend", for the rest of the process: take one of its own. Its arithmetic and
speed are the CPU's.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretend"


class Pretended(Tensor):
    """A CPU tensor that says it is on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretended:
        made: Pretended = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=torch.device(NAME, 0)
        )
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Pretended({self.held!r})"

    def tolist(self) -> Any:
        """Reads the values, as torch does for tensors on any device but not for subclasses."""
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return run(func, args, kwargs or {})


class PretendGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside it, what is made on the device is there; `seen` are the operators that ran, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __enter__(self) -> PretendGpu:
        # Or `torch.tensor` would ask the device itself for memory.
        torch._C._set_only_lift_cpu_tensors(True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append(str(func))
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator where its tensors say they are; RuntimeError where that is two places."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [isinstance(x, Pretended) for x in tensors]
    asked = kwargs.get("device")
    on_device = any(there) if asked is None else torch.device(asked).type == NAME
    # As on a GPU, a number without axes may come from the CPU, and so may the indices into a tensor.
    moves = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    free = moves or (func is torch.ops.aten.index.Tensor and there[0])
    if any(there) and not free and any(x.dim() for x, is_there in zip(tensors, there, strict=True) if not is_there):
        raise RuntimeError(f"{func}: expected all tensors on one device, got {NAME} and cpu")
    if asked is not None and torch.device(asked).type == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    held = pytree.tree_map(lambda x: x.held if isinstance(x, Pretended) else x, (args, kwargs))
    result = func(*held[0], **held[1])
    # What an operator writes into is what it gives back.
    known = {id(x.held): x for x in tensors if isinstance(x, Pretended)}

    def placed(x: Any) -> Any:
        return known[id(x)] if id(x) in known else Pretended(x)

    return pytree.tree_map(lambda x: placed(x) if isinstance(x, Tensor) else x, result) if on_device else result


def register() -> None:
    """Makes the device known to torch, for as long as the process lives."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _setup_privateuseone_for_python_backend(NAME)
