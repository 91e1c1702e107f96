"""Finished stages of one bundle, noted in its partial folder, so that the next export can go on after a kill."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from runtime.bundle import FileInfo
from runtime.errors import BundleError
from runtime.leftovers import STAGES, read_stages

if TYPE_CHECKING:
    from runtime.bundle import BundleWriter

KEPT = "kept from the interrupted run"
T = TypeVar("T")


class Key(msgspec.Struct, frozen=True):
    """The hashes of what decides every file of a bundle (export/keys.py): of the request, and of its weights."""

    request: str
    weights: str


class _Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished stage: what its files hash to, by their paths in the folder, and what else came of it.

    Of a file that later stages add to, `files` has what it was when this one was finished.
    """

    name: str
    files: dict[str, FileInfo]
    result: msgspec.Raw


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: the finished stages of one bundle, in their order."""

    key: Key
    stages: list[_Stage]


def stages_key(raw: bytes) -> Key | None:
    """What the stages in a STAGES file were made of; None where it cannot be read or none was finished."""
    record = _decode(raw)
    return record.key if record is not None and record.stages else None


def graph_stage(graph: str) -> str:
    """Names the stage in which a backend writes one graph, where it can keep each."""
    return f"graph {graph}"


class Stages:
    """The finished stages of the bundle that a writer writes; `note` says what was found of an interrupted run.

    In a folder that was taken over, stages are kept up to the first whose files are not what they were; all else in
    there is removed. Where the weights were others, nothing is kept.
    """

    def __init__(self, writer: BundleWriter, key: Key) -> None:
        self._writer, self._key = writer, key
        self._stages: list[_Stage] = []
        self._kept: dict[str, _Stage] = {}
        self.note = ""
        if writer.resumed:
            self._take_over()

    def has_kept(self, name: str) -> bool:
        """Whether the interrupted run finished a stage and its files are what they were."""
        return name in self._kept

    def kept(self, name: str, kind: type[T]) -> T | None:
        """What came of a stage that the interrupted run finished; None where it has to be made.

        Stages behind one that has to be made are made, too.
        """
        stage = self._kept.get(name)
        if stage is None:
            return None
        try:
            return msgspec.json.decode(stage.result, type=kind)
        except msgspec.ValidationError:
            self._stages = self._stages[: self._stages.index(stage)]
            self._kept = {one.name: one for one in self._stages}
            return None

    def finished(self, name: str, result: object, growing: Mapping[Path, FileInfo] | None = None) -> None:
        """Notes a finished stage. Its files are those that no earlier one made.

        `growing` are files that stages behind it add to, as they are now. Raises OSError.
        """
        folder = self._writer.path
        made = {path.relative_to(folder).as_posix(): info for path, info in (growing or {}).items()}
        known = {file for stage in self._stages for file in stage.files} | {STAGES} | made.keys()
        made |= {file: self._writer.hashed(file) for file in _files(folder) if file not in known}
        self._stages.append(_Stage(name, made, msgspec.Raw(msgspec.json.encode(result))))
        self._write()

    def _take_over(self) -> None:
        folder = self._writer.path
        record = _decode(read_stages(folder))
        found = _files(folder)
        if record is None or record.key != self._key:
            self.note = "nothing kept from the interrupted run: its weights, or files beside them, were others"
        else:
            for stage in record.stages:
                changed = [
                    file for file, info in stage.files.items() if file not in found or not self._same(file, info)
                ]
                if changed:
                    self.note = (
                        f"{changed[0]} of the interrupted run is not what it was: made again, with what followed"
                    )
                    break
                self._stages.append(stage)
        self._kept = {stage.name: stage for stage in self._stages}
        sizes = {file: info.size_bytes for stage in self._stages for file, info in stage.files.items()}
        for file in found:
            if file not in sizes:
                (folder / file).unlink()
            elif (folder / file).stat().st_size != sizes[file]:
                os.truncate(folder / file, sizes[file])
        for parent, _, _ in os.walk(folder, topdown=False):
            if parent != str(folder) and not os.listdir(parent):
                os.rmdir(parent)
        self._write()

    def _same(self, file: str, info: FileInfo) -> bool:
        path = self._writer.path / file
        try:
            size = path.stat().st_size
            if size == info.size_bytes:
                return self._writer.hashed(file) == info
            return size > info.size_bytes and _sha256_of_start(path, info.size_bytes) == info.sha256
        except (OSError, BundleError):
            return False

    def _write(self) -> None:
        path = self._writer.path / STAGES
        begun = path.with_name(f"{STAGES}.partial")
        begun.write_bytes(msgspec.json.encode(_Record(self._key, self._stages)))
        os.replace(begun, path)


def _decode(raw: bytes) -> _Record | None:
    try:
        return msgspec.json.decode(raw, type=_Record)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError):
        return None


def _files(folder: Path) -> list[str]:
    """Everything in a folder that is no folder, by its path in there; links are not followed."""
    return sorted(
        Path(parent, name).relative_to(folder).as_posix()
        for parent, folders, names in os.walk(folder)
        for name in (*names, *(one for one in folders if Path(parent, one).is_symlink()))
    )


def _sha256_of_start(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size and (chunk := file.read(min(size, 2**22))):
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()
