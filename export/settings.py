"""The JSON files of a checkpoint: read whole, with nulls left out and values that an error can show."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError

_LONGEST_SHOWN = 80
# Far above every published size, far below what would exhaust memory before anything else is noticed.
LARGEST_SIZE = 2**24
# Where quantisers leave their mark; older compressed-tensors wrote the second.
_QUANTISED_KEYS = ("quantization_config", "compression_config")


def read_object(path: Path) -> dict[str, Any] | None:
    """Reads the JSON object in `path`, None when there is no such file; CheckpointError for anything else."""
    try:
        # Anything else, a pipe say, might never end.
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a file; give the checkpoint's own")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # beside JSONDecodeError: too many digits, too deep
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}; download it again")
    return value


def without_nulls(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Copies `settings` without the keys that are null, in its sections too: a null stands for the default."""
    return {
        key: without_nulls(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if value is not None
    }


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The part `name` of a config.json, empty where there is none; CheckpointError for what is no object."""
    found = config.get(name, {})
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"config.json: {name} must be an object, got {shown(found)}; correct it or download the file again"
        )
    return found


def refuse_quantised(*sections: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a part of a config.json says that its weights are quantised."""
    for part in sections:
        for key in _QUANTISED_KEYS:
            if part.get(key):
                settings = part[key] if isinstance(part[key], Mapping) else {}
                raise CheckpointError(
                    f"config.json: the checkpoint is already quantised ({key}, {shown(settings.get('quant_method'))}); "
                    "pruneport quantises by itself, give it the float16, bfloat16 or float32 weights"
                )


def without_non_finite(value: Any) -> Any:
    """Copies a value with null for NaN and infinity, which Python reads from JSON files and JSON does not know."""
    if isinstance(value, Mapping):
        return {key: without_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_non_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: object) -> str:
    """Spells a value for an error, on one line and short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of too many digits, or nested without end
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def number(what: str, got: object, *, above: float, below: float = math.inf) -> float:
    """Returns `got` as a float between two bounds, both excluded; CheckpointError for anything else."""
    # Compared before it becomes a float: a whole number may have more digits than one holds.
    if isinstance(got, int | float) and not isinstance(got, bool) and above < got < min(below, 1e300):
        return float(got)
    allowed = f"a number above {above:g}" + (f" and below {below:g}" if below < math.inf else "")
    raise CheckpointError(f"{what} must be {allowed}, got {shown(got)}; correct it or download the file again")


def flag(what: str, got: object) -> bool:
    """Returns `got` when it is a truth value; CheckpointError for anything else, 0 and 1 included."""
    if not isinstance(got, bool):
        raise CheckpointError(f"{what} must be true or false, got {shown(got)}; correct it or download the file again")
    return got


def whole(what: str, got: object, least: int, most: int, allowed: str = "a whole number") -> int:
    """Returns `got` when it is a whole number in `least..most`; CheckpointError for anything else."""
    if type(got) is not int or not least <= got <= most:
        raise CheckpointError(
            f"{what} must be {allowed} in {least}..{most}, got {shown(got)}; correct it or download the file again"
        )
    return got


def positive(section: str, **sizes: object) -> None:
    """Checks that sizes are positive whole numbers; CheckpointError names the first that is none."""
    for name, size in sizes.items():
        whole(f"config.json: {section}.{name}", size, 1, LARGEST_SIZE, "a positive whole number")


def one_of(what: str, got: object, allowed: tuple[str, ...], remedy: str) -> str:
    """Returns `got` when it is one of the allowed words; CheckpointError with the `remedy` for anything else."""
    if not isinstance(got, str) or got not in allowed:
        raise CheckpointError(f"{what} is {shown(got)}; supported: {', '.join(allowed)}; {remedy}")
    return got
