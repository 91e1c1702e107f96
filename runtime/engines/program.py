"""What an ExecuTorch program file says about itself, read without ExecuTorch: methods, delegate calls, kernels, data.

A .pte is a flatbuffer with the file identifier ET12; field numbers below follow `schema/program.fbs` of the wheel.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from runtime.bundle import GraphInfo
from runtime.errors import EngineError
from runtime.placement import Placement

_IDENTIFIER = b"ET12"
_MAX_ITEMS = 10_000_000
# Members of the unions of the schema, counted from 1.
_TENSOR_VALUE, _KERNEL_CALL, _DELEGATE_CALL = 5, 1, 2
_EXTERNAL = 1


@dataclass(frozen=True, kw_only=True)
class Method:
    """One entry point: calls per delegate, kernels by name, and how many tensors live in a file beside the program."""

    name: str
    delegates: dict[str, int]
    kernels: dict[str, int]
    external_tensors: int


def read_program(path: Path) -> tuple[Method, ...]:
    """The methods of a .pte. Raises EngineError when the file is no whole ExecuTorch program."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[4:8] != _IDENTIFIER:
                raise EngineError(f"{path} is not an ExecuTorch program (no {_IDENTIFIER.decode()} mark); export again")
            root = _Table.root(data)
            return tuple(_method(plan) for plan in root.tables(1))
    except (struct.error, IndexError, UnicodeDecodeError, ValueError) as err:
        raise EngineError(f"{path} is a damaged ExecuTorch program ({err}); export again") from err
    except OSError as err:
        raise EngineError(f"{path} cannot be read: {err.strerror}") from err


def pick_method(graph: GraphInfo, methods: tuple[Method, ...], file: Path) -> Method:
    """The method named like the graph, as ready-made runners expect, or else the usual `forward`; or EngineError."""
    for name in (graph.name, "forward"):
        for method in methods:
            if method.name == name:
                return method
    names = ", ".join(method.name for method in methods) or "none"
    raise EngineError(f"{file} has no method {graph.name!r} or 'forward' (it has: {names}); export again")


def placement_of(method: Method) -> Placement:
    """Who runs what, as the instructions of a method say."""
    return Placement(
        delegates=dict(method.delegates),
        outside=dict(method.kernels),
        source="instructions of the program file",
    )


def _method(plan: _Table) -> Method:
    operators = [".".join(filter(None, (op.string(0), op.string(1)))) for op in plan.tables(6)]
    delegate_ids = [delegate.string(0) for delegate in plan.tables(7)]
    delegates: Counter[str] = Counter()
    kernels: Counter[str] = Counter()
    for chain in plan.tables(5):
        for instruction in chain.tables(2):
            kind, call = instruction.byte(0), instruction.table(1)
            if kind == _KERNEL_CALL and call is not None:
                kernels[operators[call.integer(0)]] += 1
            elif kind == _DELEGATE_CALL and call is not None:
                delegates[delegate_ids[call.integer(0)]] += 1
    external = 0
    for value in plan.tables(2):
        tensor = value.table(1) if value.byte(0) == _TENSOR_VALUE else None
        extra = tensor.table(9) if tensor is not None else None
        external += extra is not None and extra.byte(2) == _EXTERNAL
    return Method(
        name=plan.string(0), delegates=dict(delegates), kernels=dict(kernels.most_common()), external_tensors=external
    )


@dataclass(frozen=True)
class _Table:
    """One table of a flatbuffer: fields are found by number through the table's vtable; an absent field reads as 0."""

    data: mmap.mmap
    at: int

    @classmethod
    def root(cls, data: mmap.mmap) -> _Table:
        return cls(data, struct.unpack_from("<I", data, 0)[0])

    def _field(self, number: int) -> int:
        """Position of a field's value, 0 when the field is absent."""
        vtable = self.at - int(struct.unpack_from("<i", self.data, self.at)[0])
        if vtable < 0:
            raise IndexError("a table points before the start of the file")
        slot = 4 + 2 * number
        if slot >= struct.unpack_from("<H", self.data, vtable)[0]:
            return 0
        offset = int(struct.unpack_from("<H", self.data, vtable + slot)[0])
        return self.at + offset if offset else 0

    def byte(self, number: int) -> int:
        position = self._field(number)
        return self.data[position] if position else 0

    def integer(self, number: int) -> int:
        position = self._field(number)
        return int(struct.unpack_from("<i", self.data, position)[0]) if position else 0

    def _target(self, number: int) -> int:
        position = self._field(number)
        return position + int(struct.unpack_from("<I", self.data, position)[0]) if position else 0

    def table(self, number: int) -> _Table | None:
        target = self._target(number)
        return _Table(self.data, target) if target else None

    def tables(self, number: int) -> list[_Table]:
        target = self._target(number)
        if not target:
            return []
        count = int(struct.unpack_from("<I", self.data, target)[0])
        if count > _MAX_ITEMS or target + 4 + 4 * count > len(self.data):
            raise IndexError("a list reaches past the end of the file")
        starts = range(target + 4, target + 4 + 4 * count, 4)
        return [_Table(self.data, start + int(struct.unpack_from("<I", self.data, start)[0])) for start in starts]

    def string(self, number: int) -> str:
        target = self._target(number)
        if not target:
            return ""
        length = int(struct.unpack_from("<I", self.data, target)[0])
        if target + 4 + length > len(self.data):
            raise IndexError("a text reaches past the end of the file")
        return self.data[target + 4 : target + 4 + length].decode()
