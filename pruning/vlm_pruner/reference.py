"""VLM-Pruner as the paper tells it: data-dependent loops, slow and readable, the oracle of the static form."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.method import Features, Recovery, Trace, check_features
from pruning.recovery import CANCELLATION, recovered
from pruning.spec import PruneSpec
from pruning.vlm_pruner.settings import Settings


def prune(keys: Tensor, hidden: Tensor, spec: PruneSpec) -> tuple[Tensor, Tensor]:
    """Kept tokens and their positions: (B, N, Dk), (B, N, D) -> (B, keep, D), (B, keep) int64 ascending.

    Source: arXiv 2512.02700, algorithm 1. Arithmetic is float32, or float64 for float64 inputs.

    Raises:
        SpecError: shapes that do not fit the spec, or features that are not finite.
    """
    result = trace(keys, hidden, spec)
    return result.tokens, result.indices


def trace(keys: Tensor, hidden: Tensor, spec: PruneSpec) -> Trace:
    """Like `prune`, with the order of selection and how near each choice was to going the other way.

    The margin of a pivot is its relative lead over the runner-up; that of every other token the distance of its
    adjusted similarity from the threshold, or from the best token left out where the count cut the batch. Pivots are
    the marks. The similarity is the cosine, which decides which kept token a dropped one is mixed into.
    """
    settings = Settings.of(spec)
    check_features(Features(hidden=hidden, keys=keys), spec)
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    images = [_prune_one(k, h, spec) for k, h in zip(keys.to(work), hidden.to(work), strict=True)]
    tokens, indices, order, margin, similarity = (torch.stack(part) for part in zip(*images, strict=True))
    return Trace(
        tokens=tokens.to(hidden.dtype),
        indices=indices,
        order=order,
        margin=margin.float(),
        marks=order[:, : settings.first_pivots(spec.keep)],
        recovery=Recovery(similarity=similarity, share=settings.recovery, least_share=CANCELLATION),
    )


def _prune_one(keys: Tensor, hidden: Tensor, spec: PruneSpec) -> tuple[Tensor, ...]:
    order, margin = _pivots(keys, spec)
    similarity = _similarity(hidden, spec)
    _expand(similarity, order, margin, spec)
    selection = torch.tensor(order, device=keys.device)
    kept = selection.sort().values
    deciding = torch.tensor(margin, device=keys.device)
    return recovered(similarity, hidden, kept, Settings.of(spec).recovery), kept, selection, deciding, similarity


def _pivots(K: Tensor, spec: PruneSpec) -> tuple[list[int], list[float]]:
    """First the largest L1 norm, then always the token farthest from the pivots so far (section 3.2).

    More than one by the norm is no part of the paper.
    """
    settings = Settings.of(spec)
    score = K.abs().sum(-1)
    free = torch.ones_like(score, dtype=torch.bool)
    nearest = torch.full_like(score, torch.inf)
    order: list[int] = []
    margin: list[float] = []
    for number in range(settings.first_pivots(spec.keep)):
        ranked = score.masked_fill(~free, -1.0)
        best = int(ranked.argmax())  # the first one on ties
        runner_up = ranked.masked_fill(torch.arange(len(ranked), device=K.device) == best, -1.0).max()
        margin.append(float((ranked[best] - runner_up.clamp(min=0.0)) / ranked[best].clamp(min=1e-30)))
        order.append(best)
        free[best] = False
        nearest = torch.minimum(nearest, (K - K[best]).square().sum(-1))
        if number + 1 >= settings.norm_pivots:
            score = nearest
    return order, margin


def _similarity(H: Tensor, spec: PruneSpec) -> Tensor:
    """Cosine similarity of all pairs on the channels that vary most over the image: (N, D) -> (N, N)."""
    settings = Settings.of(spec)
    if H.shape[1] > settings.channels:
        variance = (H - H.mean(0)).square().mean(0)
        strongest = variance.sort(descending=True, stable=True).indices[: settings.channels]
        H = H[:, strongest.sort().values]
    unit = H / H.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-12)
    return (unit @ unit.T + 1.0) - 1.0  # in float32 a multiple of 2^-23, as the static form keeps it


def squared_distances(spec: PruneSpec) -> Tensor:
    """Squared distance of all pairs of places, in the spec's steps: (N, N) float64 whole numbers."""
    at = torch.tensor(spec.places(), dtype=torch.float64)
    return (at[:, None] - at[None]).square().sum(-1)


def _expand(S: Tensor, order: list[int], margin: list[float], spec: PruneSpec) -> None:
    """Centrifugal expansion with buffering for spatial sparsity (section 3.3); appends to order and margin."""
    settings = Settings.of(spec)
    distance = squared_distances(spec).to(S).sqrt()

    def adjusted() -> Tensor:
        chosen = torch.tensor(order, device=S.device)
        buffer = 1.0 + distance[:, chosen].min(1).values * settings.distance_slope(spec.extent)
        return S[:, chosen].max(1).values * buffer

    for threshold in settings.levels():
        limit = torch.tensor(threshold, dtype=torch.float32).to(S)
        selected = set(order)
        score = 1.0 - adjusted()
        ranked = [i for i in score.sort(descending=True, stable=True).indices.tolist() if i not in selected]
        for start in range(0, len(ranked), settings.token_batch):
            if len(order) == spec.keep:
                return
            batch = torch.tensor(ranked[start : start + settings.token_batch], device=S.device).sort().values
            adj = adjusted()[batch]
            near = (limit - adj).abs()
            accepted = torch.nonzero(adj < limit).flatten()
            room = spec.keep - len(order)
            if len(accepted) > room:  # the count cuts the batch: its best ones fill up
                best = (1.0 - adj).sort(descending=True, stable=True).indices
                gap = float(adj[best[room]] - adj[best[room - 1]])
                accepted = best[:room]
                near = torch.minimum(near, torch.full_like(near, gap))
            order.extend(batch[accepted].tolist())
            margin.extend(near[accepted].tolist())
