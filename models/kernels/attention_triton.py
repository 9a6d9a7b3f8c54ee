"""Attention of one new row for each request on a GPU, in Triton: all requests of a step in one call, each in its own cache.

As in flash-decoding, a program reads a part of one request's rows in one KV head, whose query heads share them; a second kernel
joins the parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLITS = 8
"""Parts of a request's rows, however many requests there are, so that its result is the same beside any others. Not tuned yet."""
TILE_BYTES, MOST_ROWS = 16384, 64
"""Of keys that a program reads at a time, in shared memory; and their rows."""
FEWEST = 16
"""Of anything that `tl.dot` takes."""


def append_and_attend(query: Tensor, key: Tensor, value: Tensor, table: Tensor, heads_before: int, scale: float) -> Tensor:
    """Write each request's new key and value into its cache, and attend to all rows there: [requests, heads, dim].

    query [requests, heads, dim]; key, value [requests, kv_heads, dim], each row's heads side by side. table [requests, 4] int64:
    where the slabs of the request's cache lie, how many rows they have, how many are written, and where a bias by row lies, in the
    dtype of the query, or 0. Slabs [2, kv_heads, rows, dim] of all layers that run follow each other; those before this one have
    `heads_before` KV heads together. A request whose address is 0 is none: nothing of it is read or written.
    """
    requests, heads, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    out = torch.empty(requests, heads, dim, dtype=query.dtype, device=query.device)
    mixed = torch.empty(requests, heads, SPLITS, dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(2, requests, heads, SPLITS, dtype=torch.float32, device=query.device)
    width = max(FEWEST, triton.next_power_of_2(dim))
    rows = min(MOST_ROWS, max(FEWEST, TILE_BYTES // (width * query.element_size())))
    with torch.cuda.device_of(query):  # a kernel starts on the current device, not on that of its arguments
        _attend[(requests, kv_heads, SPLITS)](
            query, key, value, table, mixed, sums[0], sums[1], query.stride(0), key.stride(0), value.stride(0), heads_before, scale,
            kv_heads, group, max(FEWEST, triton.next_power_of_2(group)), dim, width, SPLITS, rows,
            math.gcd(16, dim * query.element_size()),
        )  # fmt: skip
        _join[(requests * heads,)](mixed, sums[0], sums[1], out, dim, width, SPLITS)
    return out


@triton.jit
def _attend(
    query, key, value, table, mixed, tops, weights, query_stride, key_stride, value_stride, heads_before, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_WIDTH: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Of a part of the rows: the largest score, the sum of the weights e^(score - largest), and the values' sum under them."""
    request, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype: tl.constexpr = query.dtype.element_ty
    address, capacity = tl.load(table + 4 * request), tl.load(table + 4 * request + 1)
    length, bias_address = tl.load(table + 4 * request + 2), tl.load(table + 4 * request + 3)
    bias = bias_address.to(tl.pointer_type(dtype))
    slab = address.to(tl.pointer_type(dtype)) + 2 * heads_before * capacity * DIM
    keys = tl.multiple_of(slab + head * capacity * DIM, ALIGNMENT)
    values = tl.multiple_of(keys + KV_HEADS * capacity * DIM, ALIGNMENT)
    members, dims = tl.arange(0, GROUP_WIDTH), tl.arange(0, WIDTH)
    inside = dims < DIM
    written = tl.where(address != 0, DIM, 0)
    biased = tl.where(bias_address != 0, length + 1, 0)
    query_head = head * GROUP + members
    q = tl.load(
        query + request * query_stride + query_head[:, None] * DIM + dims[None, :],
        mask=(members < GROUP)[:, None] & inside[None, :], other=0.0,
    )  # fmt: skip

    largest = tl.full((GROUP_WIDTH,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP_WIDTH,), tl.float32)
    sums = tl.zeros((GROUP_WIDTH, WIDTH), tl.float32)
    if split == 0:  # the new row, which no other program may have written yet
        new_key = tl.load(key + request * key_stride + head * DIM + dims, mask=inside, other=0.0)
        new_value = tl.load(value + request * value_stride + head * DIM + dims, mask=inside, other=0.0)
        tl.store(keys + length * DIM + dims, new_key, mask=dims < written)
        tl.store(values + length * DIM + dims, new_value, mask=dims < written)
        largest = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scale
        largest += tl.load(bias + length, mask=length < biased, other=0.0).to(tl.float32)
        total += 1.0
        sums += new_value.to(tl.float32)[None, :]

    part = tl.cdiv(tl.cdiv(length, SPLITS), ROWS) * ROWS
    for start in range(split * part, min((split + 1) * part, length), ROWS):
        rows = start + tl.arange(0, ROWS)
        valid = rows < length
        places = rows[:, None] * DIM + dims[None, :]
        k = tl.load(keys + places, mask=valid[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores += tl.load(bias + rows, mask=rows < biased, other=0.0).to(tl.float32)[None, :]
        scores = tl.where(valid[None, :], scores, -float("inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        shrink, weight = tl.exp(largest - higher), tl.exp(scores - higher[:, None])
        v = tl.load(values + places, mask=valid[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(weight.to(dtype), v, sums * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(weight, 1)
        largest = higher

    place = (request * KV_HEADS * GROUP + query_head) * SPLITS + split
    tl.store(tops + place, largest, mask=members < GROUP)
    tl.store(weights + place, total, mask=members < GROUP)
    tl.store(mixed + place[:, None] * DIM + dims[None, :], sums, mask=(members < GROUP)[:, None] & inside[None, :])


@triton.jit
def _join(mixed, tops, weights, out, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    """The parts of one query head of one request."""
    row, splits, dims = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    places = row * SPLITS + splits
    largest = tl.load(tops + places)
    share = tl.exp(largest - tl.max(largest, 0))
    parts = tl.load(mixed + places[:, None] * DIM + dims[None, :], mask=(dims < DIM)[None, :], other=0.0)
    total = tl.sum(tl.load(weights + places) * share, 0)
    joined = tl.sum(parts * share[:, None], 0) / total
    tl.store(out + row * DIM + dims, joined.to(out.dtype.element_ty), mask=dims < DIM)
