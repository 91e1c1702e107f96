"""Hashes over everything that decides what the files of a bundle are, the machine aside."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from export.backends.backend import Recipe
    from export.families.family import Checkpoint
    from export.request import BundlePlan, Plan

# Larger files beside the weights are weights in other formats, which nobody reads.
_MOST_SMALL_BYTES = 64 * 2**20


def request_key(plan: Plan, bundle: BundlePlan, *, version: str) -> str:
    """Hashes everything but the weights that decides what the files of a bundle are, the machine aside."""
    from export.calibration import photos_digest
    from export.manifests import tool_versions
    from export.sweep.process import source_sha256

    made_of = {
        "bundle": bundle.name,
        "keeps": repr(bundle.keeps),
        "parts": {part: _told(recipe) for part, recipe in plan.parts.items()},
        "cut": plan.cut,
        "text_tokens": plan.text_tokens,
        "layout": plan.layout.runtime if plan.layout else None,
        "photo": [plan.photo_name, photos_digest({plan.photo_name: plan.photo})],
        "calibration": None if plan.calibration is None else photos_digest(plan.calibration),
        "source": source_sha256(),
        "tools": {"pruneport": version, **tool_versions()},
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _told(recipe: Recipe) -> list[str | None]:
    backend = recipe.backend
    return [backend.name, backend.variant, recipe.precision, recipe.computes, recipe.traced, recipe.scheme]


def checkpoint_key(checkpoint: Checkpoint) -> str:
    """Hashes what says which weights these are, and the small files beside them: configs, tokenizer, template."""
    identity = checkpoint.identity()
    digest = hashlib.sha256(f"{identity.sha256} {identity.id}\n".encode())
    for path in sorted(checkpoint.folder.iterdir()) if checkpoint.folder is not None else ():
        try:
            small = path.is_file() and path.suffix != ".safetensors" and path.stat().st_size <= _MOST_SMALL_BYTES
            content = hashlib.sha256(path.read_bytes()).hexdigest() if small else ""
        except OSError:  # who needs the file says so
            content = ""
        digest.update(f"{content}  {path.name!r}\n".encode())
    return digest.hexdigest()
