"""Attention of a sequence's rows over its keys and values: torch's SDPA, or our own products where they are faster; and of several
sequences in one call, on a GPU."""

from __future__ import annotations

import ctypes
import inspect
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels
from models.upload import upload

QUERY_BLOCK = 128
"""Query rows a block: the scores of all heads stay in the L2 cache. On a CPU without AMX, blocks take half the time of torch's
fused kernel at 577 to 616 rows in bf16: the products are large, and the upper triangle is left out. Blocks of 96 to 192 rows take
the same. Where float32 products are the faster ones, torch's fused kernel in float32 takes 0.6 times as long as blocks, and our
own a third to two thirds of that."""


@cache
def _has_amx() -> bool:
    """Whether the CPU has AMX: torch's fused kernel then takes 2.2 ms, blocks 5.9 (577 rows, 16 heads)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def attend(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, causal: bool = True,
    query_positions: Tensor | None = None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of `rows` positions over all `length` of them.

    query [rows, heads, dim]; keys, values [kv_heads, length, dim] with heads a multiple of kv_heads; returns [rows, heads, dim].
    `query_positions` [rows], ascending, say where the query rows stand among the keys; without them they are the last ones. `bias`
    [length] is added to the scores of every row.
    """
    if native := _native(query, query_positions):
        return kernels.attend_rows(native, query, keys, values, bias, scale, causal=causal)
    if query.device.type == "cpu" and query.dtype != torch.float32 and kernels.many_rows() == "float32":
        # In bfloat16, oneDNN compiles each shape of a product anew, in 2 ms, and keeps a thousand of them, half a megabyte each.
        wide = (query.float(), keys.float(), values.float())
        bias = None if bias is None else bias.float()
        return attend(*wide, scale=scale, causal=causal, query_positions=query_positions, bias=bias).to(query.dtype)
    rows, length = len(query), keys.shape[1]
    if rows == 1 and (query_positions is None or not causal or int(query_positions) == length - 1):
        return _single_row(query * scale, keys, values, bias)
    if query_positions is not None:
        return _selected_rows(query * scale, keys, values, bias, query_positions, causal=causal)
    if query.device.type == "cpu" and kernels.many_rows() == "float32":
        return _sdpa(query, keys, values, bias, scale, causal=causal)
    if query.device.type == "cpu" and not (query.dtype == torch.bfloat16 and _has_amx()):
        return _blockwise(query * scale, keys, values, bias, causal=causal)
    return _sdpa(query, keys, values, bias, scale, causal=causal)


def _native(query: Tensor, query_positions: Tensor | None) -> ctypes.CDLL | None:
    """The CPU kernels, if they attend for such rows."""
    if query.device.type != "cpu" or query.dtype not in (torch.bfloat16, torch.float32) or query.requires_grad:
        return None
    if len(query) == 1 or query_positions is not None or kernels.many_rows() != "float32":
        return None
    return kernels.attention_library()


def _selected_rows(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, query_positions: Tensor, *, causal: bool
) -> Tensor:
    """A few query rows: a prompt's text, or the rows whose logits are wanted."""
    rows, heads, dim = query.shape
    kv_heads, length, _ = keys.shape
    grouped = query.view(rows, kv_heads, -1, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    scores = torch.bmm(grouped, keys.transpose(1, 2)).view(heads, rows, length)
    if bias is not None:
        scores += bias
    if causal:
        scores.masked_fill_(torch.arange(length, device=keys.device) > query_positions[:, None], -torch.inf)
    mixed = torch.bmm(scores.softmax(-1).view(kv_heads, -1, length), values)
    return mixed.view(heads, rows, dim).transpose(0, 1)


def _single_row(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """One query row: the query heads of a KV head are columns of one product, so keys are read once and never repeated."""
    kv_heads, _, dim = keys.shape
    scores = torch.bmm(keys, query.view(kv_heads, -1, dim).transpose(1, 2))
    if bias is not None:
        scores += bias[:, None]
    return torch.bmm(scores.softmax(1).transpose(1, 2), values).view(query.shape)


def _sdpa(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, *, causal: bool) -> Tensor:
    gqa = query.shape[1] != len(keys)
    mask = None
    if bias is not None:
        mask = bias.expand(len(query), -1)
    elif causal and len(query) < keys.shape[1]:
        mask = query.new_zeros(len(query), keys.shape[1])
    if causal and mask is not None:
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1 + mask.shape[1] - mask.shape[0]), -torch.inf)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None], keys[None], values[None], mask, is_causal=causal and mask is None, enable_gqa=gqa,
        scale=scale,
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _blockwise(query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, *, causal: bool) -> Tensor:
    """Blocks of query rows; the query heads of a KV head are rows of one product, so keys are never repeated."""
    rows, heads, dim = query.shape
    kv_heads, before = len(keys), keys.shape[1] - rows
    group = heads // kv_heads
    out = torch.empty_like(query)
    for start in range(0, rows, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, rows)
        count = stop - start
        visible = before + stop if causal else keys.shape[1]
        block = query[start:stop].view(count, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
        scores = torch.bmm(block, keys[:, :visible].transpose(1, 2)).view(kv_heads * group, count, visible)
        if bias is not None:
            scores += bias[:visible]
        if causal:
            future = torch.ones(count, count, dtype=torch.bool, device=query.device).triu(1)
            scores[:, :, before + start :].masked_fill_(future, -torch.inf)
        mixed = torch.bmm(scores.softmax(-1).view(kv_heads, -1, visible), values[:, :visible])
        out[start:stop] = mixed.view(kv_heads, group, count, dim).permute(2, 0, 1, 3).reshape(count, heads, dim)
    return out


# ---- several sequences in one call, on a GPU


def attend_images(query: Tensor, keys: Tensor, values: Tensor, *, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention of each image's rows over all of them. query, keys, values [images, rows, heads, dim]; `bias` [images, rows] is
    added to the scores of every row of its image. Returns [images, rows, heads, dim]."""
    if query.device.type == "cuda":
        return _attend_images_together(query, keys, values, scale, bias)
    heads_first = (rows.transpose(1, 2).contiguous() for rows in (keys, values))
    biases = bias if bias is not None else [None] * len(query)
    mixed = [attend(q, k, v, scale=scale, causal=False, bias=b) for q, k, v, b in zip(query, *heads_first, biases, strict=True)]
    return torch.stack(mixed)


def _attend_images_together(query: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    mask = None if bias is None else bias[:, None, None].expand(-1, 1, query.shape[1], -1)
    query, keys, values = (rows.transpose(1, 2) for rows in (query, keys, values))
    return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale).transpose(1, 2)


BIAS_DIMS = 3
"""Head dimensions that hold a bias: 3 pieces of 8 bits each in bfloat16 are all 24 bits of a float32."""
FLASH_DIMS, FLASH_ALIGNMENT = 256, 8
"""Flash kernels take so many head dimensions at most, and multiples of that."""


@cache
def flash_attention() -> Callable[..., Any] | None:
    """torch's flash attention of packed sequences with a scale and a window of its own: from torch 2.11 on; else None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    parameters = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= parameters.keys():
        return None
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in parameters else varlen_attn


def packs(query: Tensor, kv_heads: int) -> bool:
    """Whether `attend_packed` takes query rows [rows, heads, dim] like these."""
    if query.device.type != "cuda" or query.dtype == torch.float32 or (flash := flash_attention()) is None:
        return False
    grouped = query.shape[1] == kv_heads or isinstance(flash, partial)
    capable = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return grouped and capable and query.shape[2] + BIAS_DIMS <= FLASH_DIMS


def attend_packed(
    query: Tensor, keys: Tensor, values: Tensor, query_lengths: Sequence[int], lengths: Sequence[int], *, scale: float,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of several sequences, each one's last rows over all its rows, in one call of a flash kernel.

    query [sum of query_lengths, heads, dim]; keys, values [sum of lengths, kv_heads, dim]; `bias` [sum of lengths] is added to the
    scores of every row of its sequence. Returns [sum of query_lengths, heads, dim].
    """
    flash, dim = flash_attention(), query.shape[2]
    assert flash is not None, "callers ask `packs` first"
    widened = widen_heads(query, keys, values, bias, scale)
    starts = [_starts(tuple(counts), query.device) for counts in (query_lengths, lengths)]
    # The window's right end closes at the diagonal, which flash kernels align with the last row and the last key.
    mixed: Tensor = flash(*widened, *starts, max(query_lengths), max(lengths), scale=scale, window_size=(-1, 0))
    return mixed[..., :dim]


def widen_heads(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """query [rows, heads, dim], keys and values [length, kv_heads, dim], with as many head dimensions as flash kernels ask for.

    Among them lies `bias` [length], which those kernels do not take: the query has a power of two there, which is exact, and keys
    have what it takes to make the bias of it, in pieces, as one number would be rounded. Ours.
    """
    dim = query.shape[2]
    used = dim if bias is None else dim + BIAS_DIMS
    if more := used - dim + -used % FLASH_ALIGNMENT:
        query, keys, values = (F.pad(rows, (0, more)) for rows in (query, keys, values))
    if bias is not None:
        power = 2.0 ** round(-math.log2(scale))
        rest = bias.float() / (scale * power)
        query[..., dim:used] = power
        for place in range(dim, used):
            keys[..., place] = rest[:, None]
            rest = rest - rest.to(keys.dtype).float()
    return query, keys, values


@lru_cache(maxsize=16)  # the same in most layers of a pass
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence starts among packed rows, and where the last one ends: [sequences + 1], int32."""
    return upload(list(accumulate(lengths, initial=0)), device, torch.int32)
