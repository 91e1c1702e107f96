"""The one place that knows where the rooms lie and by which names they are imported.

`export`, `pruning` and `runtime` lie beside this package in a checkout and inside it in an installed wheel; either way
they are `pruneport.export`, `pruneport.pruning` and `pruneport.runtime`. They import each other by their short names,
which in somebody else's project may mean something else. So an import inside a room means the rooms, and an import
anywhere else means what it would mean without pruneport: nothing here touches `sys.path`, or a foreign module.

A module is loaded once, whatever it is called. A script that has a checkout on its path may import `runtime.bundle`,
before or after pruneport: that is the same module as `pruneport.runtime.bundle`.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_loader
from pathlib import Path
from types import ModuleType

ROOMS = ("export", "pruning", "runtime")
FACE = __name__.partition(".")[0]

_HERE = Path(__file__).resolve().parent
FOLDER = _HERE if (_HERE / ROOMS[0]).is_dir() else _HERE.parent


def _import(
    name: str,
    globals: Mapping[str, object] | None = None,
    locals: Mapping[str, object] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> ModuleType:
    """Stands for `__import__` inside the rooms: there `runtime` is this one, and all other names are what they are."""
    room = name.partition(".")[0]
    if level or room not in ROOMS:
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    module = builtins.__import__(f"{FACE}.{name}", globals, locals, fromlist or (), 0)
    return module if fromlist else sys.modules[f"{FACE}.{room}"]


class _RoomLoader(SourceFileLoader):
    """Runs a file of a room with builtins of its own, whose import statement knows the rooms."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class _OtherName(Loader):
    """Puts the module of one name in the place of another."""

    def __init__(self, name: str) -> None:
        self.name = name

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self.name)


class _Finder(MetaPathFinder):
    """Finds the rooms by their long names, and by their short ones where those would lead to the same files."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        short = fullname.removeprefix(f"{FACE}.")
        room, _, rest = short.partition(".")
        if room not in ROOMS:
            return None
        name = f"{_loaded_as(room)}.{rest}".removesuffix(".")
        if fullname == short and not (self._is_alias(room) if rest else _ours(PathFinder.find_spec(room))):
            return None  # somebody else's, or this room's where a script imported it before pruneport
        if fullname != name:
            return spec_from_loader(fullname, _OtherName(name))
        if fullname == short:
            return None
        spec = PathFinder.find_spec(fullname, path if rest else [str(FOLDER)])
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _RoomLoader(spec.loader.name, spec.loader.path)
        return spec

    @staticmethod
    def _is_alias(room: str) -> bool:
        return sys.modules[room] is sys.modules.get(f"{FACE}.{room}")


def _loaded_as(room: str) -> str:
    """The name that the room's modules have: the long one, unless a script has imported the room by the short one."""
    module = sys.modules.get(room)
    spec = getattr(module, "__spec__", None)
    return room if spec is not None and spec.name == room and _ours(spec) else f"{FACE}.{room}"


def _ours(spec: ModuleSpec | None) -> bool:
    """Says whether a top-level module is a room of this pruneport."""
    if spec is None or spec.origin is None:
        return False
    return Path(spec.origin).resolve().parent.parent == FOLDER


def find_rooms() -> None:
    """Makes the rooms importable from now on."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
