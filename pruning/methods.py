"""The pruning methods, by the names that requests and manifests give them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pruning.dart import DART
from pruning.divprune import DIVPRUNE
from pruning.fastv import FASTV
from pruning.holov import HOLOV
from pruning.method import Features, Method, settings_of
from pruning.pool import POOL
from pruning.random_tokens import RANDOM
from pruning.spec import PruneSpec, SpecError
from pruning.standout import STANDOUT
from pruning.uniform import UNIFORM
from pruning.visionzip import VISIONZIP
from pruning.vlm_pruner.method import NO_BSS, NO_RECOVERY, NORM_PIVOTS, VLM_PRUNER

METHODS: dict[str, Method] = {
    "vlm-pruner": VLM_PRUNER,
    "vlm-pruner-no-bss": NO_BSS,
    "vlm-pruner-no-recovery": NO_RECOVERY,
    "vlm-pruner-norm-pivots": NORM_PIVOTS,
    "standout": STANDOUT,
    "uniform": UNIFORM,
    "random": RANDOM,
    "pool": POOL,
    "divprune": DIVPRUNE,
    "dart": DART,
    "visionzip": VISIONZIP,
    "holov": HOLOV,
    "fastv": FASTV,
}


def method_named(name: str) -> Method:
    """Gives the method of that name; SpecError for a name that none has."""
    if name not in METHODS:
        raise SpecError(f"method={name!r} is not known; allowed: {', '.join(METHODS)}")
    return METHODS[name]


def settings_numbers(spec: PruneSpec) -> dict[str, int | float]:
    """Lists the constants that a spec's method works with, by name; those that are None are left out."""
    method = method_named(spec.method)
    settings = settings_of(spec, method.name, method.settings)
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: value for name, value in values.items() if value is not None}


def selector(spec: PruneSpec, device: torch.device | str = "cpu") -> Callable[[Features], tuple[Tensor, Tensor]]:
    """Gives the choice of a spec's method as a function: Features -> tokens (B, keep, D), indices (B, keep) int64.

    It is the form that graphs hold, on `device`. A method that has none, because it looks at the question, is computed
    as its paper tells it, on the CPU, wherever the features are. SpecError for a spec that has no answer.
    """
    method = method_named(spec.method)
    if "float32" in method.arithmetics:
        module = method.module(spec, "float32").to(device)

        def static(features: Features) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                kept = module(features)
            return kept.tokens, kept.indices.long()

        return static

    def told(features: Features) -> tuple[Tensor, Tensor]:
        here = Features(features.hidden.cpu(), *(None if x is None else x.cpu() for x in features[1:]))
        trace = method.choose(here, spec)
        where = features.hidden.device
        return trace.tokens.to(where), trace.indices.to(where)

    return told
