"""Recovery of what was dropped, as in VLM-Pruner (arXiv 2512.02700, section 3.4), for a loop and for a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pruning.arithmetic import above, first_largest

# A kept token is mixed with the tokens it stands for only while their similarities do not cancel: weights are
# similarities over their sum, so a sum this small against the absolute sum would amplify the mean a thousandfold.
CANCELLATION = 2.0**-10


def recovered(similarity: Tensor, hidden: Tensor, kept: Tensor, share: float) -> Tensor:
    """Kept tokens, each mixed with the dropped ones that are most similar to it: (N, N), (N, D), (keep,) -> (keep, D).

    `share` of a kept token is replaced by the mean of those it stands for, weighted by similarity.
    """
    dropped = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    dropped[kept] = False
    to_kept = similarity[:, kept]
    stands_for = one_hot(to_kept.argmax(1), len(kept)).bool() & dropped[:, None]
    weight = torch.where(stands_for, to_kept, torch.zeros_like(to_kept))
    total = weight.sum(0)
    mixed = total > CANCELLATION * weight.abs().sum(0)
    mean = (weight / total.clamp(min=1e-8)).T @ hidden
    return torch.where(mixed[:, None], (1.0 - share) * hidden[kept] + share * mean, hidden[kept])


def recovering(
    similarity: Tensor, chosen: Tensor, pick: Tensor, share: float, *, ones: Tensor, places: Tensor
) -> Tensor:
    """The matrix whose product with `hidden` is what `recovered` gives: (B, N, N), (B, N, 1), (B, keep, N) -> as pick.

    `chosen` has ones where tokens stay, `pick` is one-hot; `ones` (B, N, 1) adds up, `places` (1, 1, keep) counts.
    """
    to_kept = torch.bmm(similarity, pick.transpose(1, 2))  # (B, N, keep)
    stands_for = first_largest(to_kept, places)
    weight = (stands_for * to_kept * (1.0 - chosen)).transpose(1, 2)  # (B, keep, N)
    total = torch.bmm(weight, ones)
    mixed = above(total, torch.bmm(weight.abs(), ones) * CANCELLATION) * share
    return pick * (1.0 - mixed) + weight * (mixed / total.clamp(min=1e-8))
