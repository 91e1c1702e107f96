"""Attention as two batched products around a softmax, heads folded into the batch: the form every delegate takes."""

from __future__ import annotations

import torch
from torch import Tensor


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(1, T, heads * head_dim) -> (heads, T, head_dim)"""
    _, tokens, width = x.shape
    return x.reshape(tokens, heads, width // heads).permute(1, 0, 2)


def heads_last(x: Tensor) -> Tensor:
    """(heads, T, head_dim) -> (1, T, heads * head_dim)"""
    heads, tokens, head_dim = x.shape
    return x.permute(1, 0, 2).reshape(1, tokens, heads * head_dim)


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of scaled queries (H, T, d) over keys and values (Hkv, S, d) -> (H, T, d).

    `mask` (T, S) is added to the scores. With fewer key heads than query heads, the queries that share a key head are
    laid one after another along the token dimension, so that no key is copied.
    """
    heads, tokens, head_dim = query.shape
    shared, positions, _ = keys.shape
    if heads == shared:
        scores = torch.bmm(query, keys.permute(0, 2, 1))
    else:
        grouped = query.reshape(shared, heads // shared * tokens, head_dim)
        scores = torch.bmm(grouped, keys.permute(0, 2, 1)).reshape(heads, tokens, positions)
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1)
    if heads == shared:
        return torch.bmm(weights, values)
    grouped = weights.reshape(shared, heads // shared * tokens, positions)
    return torch.bmm(grouped, values).reshape(heads, tokens, head_dim)
