"""Attention of one sequence's rows over its keys and values: one signature; torch's SDPA, or blocks where that is faster."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# Query rows a block: scores of all heads stay in the L2 cache. On a CPU without tiles this takes half the time of torch's fused
# kernel at 577 to 616 rows (measured in bf16; 96 to 192 are alike): the products are large and the upper triangle is left out.
BLOCK = 128


@cache
def _has_amx() -> bool:
    """Whether the CPU multiplies bf16 tiles (AMX): there torch's fused kernel takes 2.2 ms where blocks take 5.9 (577 rows, 16
    heads)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def attend(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, causal: bool = True, at: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of `rows` positions over all `length` of them.

    query [rows, heads, dim]; keys, values [kv_heads, length, dim] with heads a multiple of kv_heads; returns [rows, heads, dim].
    `at` [rows] are the rows' places among the keys, ascending, where only some ask; without it `rows` is 1 (the last place) or
    `length` (all of them). `bias` [length] is added to every row's scores of the keys.
    """
    rows, length = len(query), keys.shape[1]
    if at is None and rows not in (1, length):
        raise ValueError(f"{rows} query rows over {length} keys: only 1 or all of them, unless `at` says which")
    if rows == 1 and (at is None or not causal or int(at) == length - 1):
        return _one(query * scale, keys, values, bias)
    if at is not None:
        return _some(query * scale, keys, values, bias, at, causal=causal)
    if query.device.type == "cpu" and not (query.dtype == torch.bfloat16 and _has_amx()):
        return _blocks(query * scale, keys, values, bias, causal=causal)
    return _fused(query, keys, values, bias, scale, causal=causal)


def _some(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, at: Tensor, *, causal: bool) -> Tensor:
    """A few query rows: a prompt's text, or the rows that say an answer."""
    rows, heads, dim = query.shape
    kv_heads, length, _ = keys.shape
    grouped = query.view(rows, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).view(heads, rows, length)
    if bias is not None:
        scores += bias
    if causal:
        scores.masked_fill_(torch.arange(length, device=at.device) > at[:, None], -torch.inf)
    mixed = torch.bmm(scores.softmax(-1).view(kv_heads, -1, length), values)
    return mixed.view(heads, rows, dim).transpose(0, 1)


def _one(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """One query row: the heads that share a key head are columns of one product, so keys are read once and never repeated."""
    kv_heads, _, dim = keys.shape
    scores = torch.bmm(keys, query.view(kv_heads, -1, dim).transpose(1, 2))
    if bias is not None:
        scores += bias[:, None]
    return torch.bmm(scores.softmax(1).transpose(1, 2), values).view(query.shape)


def _fused(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, *, causal: bool) -> Tensor:
    gqa = query.shape[1] != len(keys)
    mask = None
    if bias is not None:
        mask = bias.expand(len(query), -1)
        if causal:
            mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -torch.inf)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], mask, is_causal=causal and mask is None, enable_gqa=gqa,
        scale=scale,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _blocks(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, *, causal: bool) -> Tensor:
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
        if bias is not None:
            scores += bias[:seen]
        if causal:
            ahead = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
            scores[:, :, start:].masked_fill_(ahead, -torch.inf)
        mixed = torch.bmm(scores.softmax(-1).view(kv_heads, -1, seen), values[:, :seen])
        out[start:stop] = mixed.view(kv_heads, group, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)
    return out
