"""Attention of one sequence's rows over its keys and values: one signature; torch's SDPA, or blocks where that is faster."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Query rows a block: scores of all heads stay in the L2 cache. On CPU this takes half the time of torch's fused kernel at 577 to
# 616 rows (measured in bf16; 96 to 192 are alike), because the products are large and the upper triangle is left out.
BLOCK = 128


def attend(query: Tensor, keys: Tensor, values: Tensor, *, scale: float, causal: bool = True) -> Tensor:
    """Attention of the last `rows` positions over all `length` of them.

    query [rows, heads, dim]; keys, values [kv_heads, length, dim] with heads a multiple of kv_heads; returns [rows, heads, dim].
    `rows` is 1 (decode, or the last row of a prompt) or `length` (prefill): there is nothing between them to serve.
    """
    rows, length = len(query), keys.shape[1]
    if rows not in (1, length):
        raise ValueError(f"{rows} query rows over {length} keys: only 1 or all of them")
    if rows == 1:
        return _one(query * scale, keys, values)
    if query.device.type == "cpu":
        return _blocks(query * scale, keys, values, causal=causal)
    return _fused(query, keys, values, scale, causal=causal)


def _one(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query row: the heads that share a key head are columns of one product, so keys are read once and never repeated."""
    kv_heads, _, dim = keys.shape
    scores = torch.bmm(keys, query.view(kv_heads, -1, dim).transpose(1, 2))
    return torch.bmm(scores.softmax(1).transpose(1, 2), values).view(query.shape)


def _fused(query: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool) -> Tensor:
    gqa = query.shape[1] != len(keys)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], is_causal=causal, enable_gqa=gqa, scale=scale
    )
    return out[0].transpose(0, 1)


def _blocks(query: Tensor, keys: Tensor, values: Tensor, *, causal: bool) -> Tensor:
    """Blocks of query rows; the query heads that share a key head are rows of one product, so keys are never repeated."""
    rows, heads, dim = query.shape
    kv_heads = len(keys)
    group = heads // kv_heads
    out = torch.empty_like(query)
    for start in range(0, rows, BLOCK):
        stop = min(start + BLOCK, rows)
        count = stop - start
        seen = stop if causal else keys.shape[1]
        block = query[start:stop].view(count, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
        scores = torch.bmm(block, keys[:, :seen].transpose(1, 2)).view(kv_heads * group, count, seen)
        if causal:
            ahead = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
            scores[:, :, start:].masked_fill_(ahead, -torch.inf)
        mixed = torch.bmm(scores.softmax(-1).view(kv_heads, -1, seen), values[:, :seen])
        out[start:stop] = mixed.view(kv_heads, group, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)
    return out
