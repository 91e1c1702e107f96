"""Attention as two batched products around a softmax, heads folded into the batch: the form every delegate takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Far below any score, yet with room to add one to it in float16.
HIDDEN = -3e4


def heads_first(x: Tensor, heads: int) -> Tensor:
    """(1, T, heads * head_dim) -> (heads, T, head_dim)"""
    _, tokens, width = x.shape
    return x.reshape(tokens, heads, width // heads).permute(1, 0, 2)


def heads_last(x: Tensor) -> Tensor:
    """(heads, T, head_dim) -> (1, T, heads * head_dim)"""
    heads, tokens, head_dim = x.shape
    return x.permute(1, 0, 2).reshape(1, tokens, heads * head_dim)


def apart(x: Tensor, windows: int) -> Tensor:
    """Windows, equal parts of the tokens that see nothing but themselves, folded into the heads.

    (H, T, d) -> (H * windows, T / windows, d)
    """
    heads, tokens, width = x.shape
    return x if windows == 1 else x.reshape(heads * windows, tokens // windows, width)


def blocks(x: Tensor, first: int, second: int, third: int, fourth: int) -> Tensor:
    """Swaps the middle two of four axes that the rows of x (1, T, D) are: -> (first, third, second, fourth * D)

    No more than four axes at a time, because delegates take no more.
    """
    return x.reshape(first, second, third, fourth * x.shape[2]).permute(0, 2, 1, 3)


class Part(NamedTuple):
    """Keys and values that are attended beside others: (Hkv, S, d) each, and what is added to their scores."""

    key: Tensor
    value: Tensor
    mask: Tensor | None = None  # broadcasts to (T, S)


def attention(query: Tensor, parts: Sequence[Part]) -> Tensor:
    """Softmax attention of scaled queries (H, T, d) over all parts together -> (H, T, d).

    Parts are never copied into one tensor: only their scores are, which is what makes a long cache cheap for few
    queries. With fewer key heads than query heads, the queries that share a key head are laid one after another along
    the token dimension, so that no key is copied either.
    """
    heads, tokens, head_dim = query.shape
    shared = parts[0].key.shape[0]
    grouped = query if heads == shared else query.reshape(shared, heads // shared * tokens, head_dim)
    scores = []
    for part in parts:
        score = torch.bmm(grouped, part.key.permute(0, 2, 1))
        if heads != shared:
            score = score.reshape(heads, tokens, part.key.shape[1])
        if part.mask is not None:
            score = score + part.mask
        scores.append(score)
    weights = torch.softmax(scores[0] if len(scores) == 1 else torch.cat(scores, dim=2), dim=-1)
    mixed, start = None, 0
    for part in parts:
        length = part.key.shape[1]
        weight = weights if len(parts) == 1 else weights[:, :, start : start + length]
        start += length
        if heads != shared:
            weight = weight.reshape(shared, heads // shared * tokens, length)
        share = torch.bmm(weight, part.value)
        mixed = share if mixed is None else mixed + share
    assert mixed is not None
    return mixed if heads == shared else mixed.reshape(heads, tokens, head_dim)


def causal_mask(tokens: int, *, past: int = 0) -> Tensor:
    """(tokens, past + tokens) float32: 0 where a token may look, far below 0 ahead of it; all of the past is open."""
    ahead = torch.ones(tokens, tokens).triu(diagonal=1) * HIDDEN
    return torch.cat([torch.zeros(tokens, past), ahead], dim=1)
