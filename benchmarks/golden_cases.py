"""The authors' selections: cases, features and answers, from $PRUNEPORT_GOLDEN or else from tests/golden."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from pruning import PruneSpec
from pruning.vlm_pruner.settings import Settings

FOLDER = Path(os.environ.get("PRUNEPORT_GOLDEN") or Path(__file__).parent.parent / "tests" / "golden")


@dataclass(frozen=True, kw_only=True)
class NearTie:
    """A dropped token that is as similar to a second kept token as to the first, but for the last bits."""

    dropped: int
    kept: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of selection.json."""

    name: str
    features: str
    spec: PruneSpec
    official_count: int
    near_ties: tuple[NearTie, ...]
    has_tokens: bool


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one lowered graph is made for; it serves all features of these widths."""

    spec: PruneSpec
    key_width: int
    hidden_width: int

    def __str__(self) -> str:
        spec = self.spec
        own = Settings.of(spec)
        return (
            f"{spec.grid[0]}x{spec.grid[1]}-keep{spec.keep}-p{own.pivots}-t{own.threshold:g}-b{own.token_batch}"
            f"-{self.key_width}-{self.hidden_width}"
        )


def tensor_of(name: str) -> torch.Tensor:
    """One tensor of the vectors."""
    with safe_open(FOLDER / "selection.safetensors", framework="pt") as file:
        return torch.as_tensor(file.get_tensor(name))


def _width(name: str) -> int:
    with safe_open(FOLDER / "selection.safetensors", framework="pt") as file:
        return int(file.get_slice(name).get_shape()[1])


def cases() -> tuple[Case, ...]:
    """Every selection case of the vectors."""
    return tuple(
        Case(
            name=row["name"],
            features=row["features"],
            official_count=row["official_count"],
            spec=PruneSpec(
                grid=tuple(row["grid"]),
                keep=row["keep"],
                settings=Settings(pivots=row["pivots"], threshold=row["threshold"], token_batch=row["token_batch"]),
            ),
            near_ties=tuple(NearTie(dropped=tie["dropped"], kept=tuple(tie["kept"])) for tie in row["near_ties"]),
            has_tokens=row.get("has_tokens", True),
        )
        for row in json.loads((FOLDER / "selection.json").read_text())
    )


def program_of(case: Case) -> Program:
    """What the graph that serves a case is made for."""
    return Program(
        spec=case.spec, key_width=_width(f"{case.features}.keys"), hidden_width=_width(f"{case.features}.hidden")
    )


def features_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (1, N, Dk) and hidden states (1, N, D), float32."""
    return tensor_of(f"{name}.keys").float()[None], tensor_of(f"{name}.hidden").float()[None]
