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

from export.weights import Waiting

if TYPE_CHECKING:
    import io


class Packed(Waiting):
    """What a delegate packs of a program's weights lies in `folder`, in files named by their content.

    `known` is for who packs: what became of weights by their `key`, so that no weight is read again for another graph.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.known: dict[tuple[object, ...], Any] = {}

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
