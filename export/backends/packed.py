"""The weights of one ExecuTorch program while it is made: read when they are asked for, and on disk once packed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir._serialize._named_data_store import NamedDataStore

from export.weights import Late, late_parameters, parts_of

if TYPE_CHECKING:
    import io

    from torch import nn


class Packed:
    """What a delegate packs of a program's weights lies in `folder`, in files named by their content.

    Programs that are traced hold stand-ins (see `export.weights.Late`) for the weights of the graphs that this was
    shown. `numbers` reads one; the last that was read is kept, because a quantised weight is asked for in parts.
    `known` is for who packs: what became of weights by their `key`, so that no weight is read again for another graph.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[tuple[object, ...], Any] = {}
        # By the address of its memory, which a stand-in keeps through tracing and lowering; held, so that it stays so.
        self._waiting: dict[int, tuple[Late, str, torch.Tensor]] = {}
        self._last: tuple[tuple[str, ...], dict[str, torch.Tensor]] | None = None

    def expect(self, graph: nn.Module) -> None:
        """Remembers what the stand-ins of a graph stand for."""
        for _, _, parameter, late in late_parameters(graph):
            for part, tensor in parts_of(parameter.data).items():
                self._waiting[tensor.data_ptr()] = late, part, tensor

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
        late, part = found
        if self._last is None or self._last[0] != late.key:
            self._last = None  # before the next is read
            self._last = late.key, parts_of(late.read())
        read = self._last[1][part]
        if read.shape != tensor.shape or read.dtype != tensor.dtype:
            raise AssertionError(
                f"{late.key} was read as {list(read.shape)} {read.dtype}, but traced as {list(tensor.shape)} "
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

    def read_rest(self, program: torch.export.ExportedProgram) -> None:
        """Reads the weights that a lowered program still has, those that no delegate took."""
        for held in (program.state_dict, program.constants):
            for name, value in held.items():
                if isinstance(value, torch.Tensor) and self.key(value) is not None:
                    held[name] = self.numbers(value)

    @contextmanager
    def on_disk(self) -> Iterator[None]:
        """Has everything that a delegate packs put into files, at once."""
        usual = NamedDataStore._add_named_data_to_map

        def add(store: NamedDataStore, key: str, data: Any, *args: Any) -> None:
            usual(store, key, self.file(data) if isinstance(data, bytes) else data, *args)

        NamedDataStore._add_named_data_to_map = add
        try:
            yield
        finally:
            NamedDataStore._add_named_data_to_map = usual

    def file(self, data: bytes) -> FileBackedData:
        """Stores bytes under the name of their content, where other graphs find the same ones."""
        digest = hashlib.sha256(data)
        path = self.folder / digest.hexdigest()
        if not path.exists():
            path.write_bytes(data)
        return _Spent(str(path), sha256=digest.digest())


class _Spent(FileBackedData):  # type: ignore[misc]
    """Bytes in a file that is removed once they are written where they belong, so that the disk has them once."""

    def write_to_file(self, outfile: io.BufferedIOBase) -> None:
        super().write_to_file(outfile)
        Path(self._path).unlink()
