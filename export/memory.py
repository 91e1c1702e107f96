"""Memory that an export may take here: what the machine has available, or a container's limit leaves."""

from __future__ import annotations

from pathlib import Path, PurePosixPath


def available_bytes(root: Path = Path("/")) -> int:
    """What can be taken without swapping; `root` is where /proc and /sys are."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_left_by_limits(root)])


def fits_beside(size_bytes: int) -> bool:
    """Whether so much may be held for convenience: it leaves most of what is available to what an export needs."""
    return size_bytes < 0.3 * available_bytes()


def _left_by_limits(root: Path) -> list[int]:
    """What each limit leaves: of control groups, version 1 and 2, that this process is in, and of those around them."""
    left = []
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            folder, limit, used, files = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            folder = root / "sys/fs/cgroup/memory"
            limit, used, files = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        # A container often sees its own group as the root, under the path that it has outside.
        inside = PurePosixPath(path.lstrip("/"))
        for group in (folder / inside, *(folder / parent for parent in inside.parents)):
            most, now = _number(_text(group / limit)), _number(_text(group / used))
            if most is not None and now is not None:
                # Pages of files that nobody reads are given back when they are needed.
                given_back = _number(_stat(group / "memory.stat").get(files, "")) or 0
                left.append(max(0, most - now + given_back))
    return left


def _stat(path: Path) -> dict[str, str]:
    return {words[0]: words[1] for line in _text(path).splitlines() if len(words := line.split()) == 2}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None  # `max` is no limit
