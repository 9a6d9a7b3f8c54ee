"""Products of few rows on a GPU, in Triton: weights compressed to their non-zeros, as `models.sparse.SparseLinear` holds them.

A program walks a few rows of the weight from left to right. The running count of set bits says where each weight's value lies.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, OUTS, INPUTS = 16, 16, 128
"""A tile: rows of x (the fewest that `tl.dot` takes), rows of the weight, columns of both. Not tuned yet."""


def multiply(x: Tensor, values: Tensor, masks: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in], at most ROWS of them, times the weight, transposed, plus bias [out]: [rows, out] in the dtype of x."""
    x, (outputs, words) = x.contiguous(), masks.shape
    y = x.new_empty(len(x), outputs)
    with torch.cuda.device_of(x):  # a kernel starts on the current device, not on that of its arguments
        _multiply[(triton.cdiv(outputs, OUTS),)](
            x, values, masks, offsets, bias, y, len(x), x.shape[1], outputs, words, ROWS, OUTS, INPUTS
        )
    return y


def decompress(values: Tensor, masks: Tensor, offsets: Tensor, first: int, out: Tensor) -> Tensor:
    """Write the dense rows from `first` on to `out` [rows, in], contiguous."""
    rows, inputs = out.shape
    with torch.cuda.device_of(out):
        _decompress[(triton.cdiv(rows, OUTS),)](values, masks, offsets, out, first, rows, inputs, masks.shape[1], OUTS, INPUTS)
    return out


@triton.jit
def _tile(values, masks, starts, rows, valid, columns, words):
    """Weights [OUTS, INPUTS] at `columns` of `rows`, whose values lie from `starts` [OUTS] on; and where the next ones do."""
    inside = valid[:, None] & (columns < 32 * words)[None, :]
    word = tl.load(masks + rows[:, None] * words + (columns // 32)[None, :], mask=inside, other=0)
    kept = (word >> (columns % 32)[None, :]) & 1
    places = starts[:, None] + tl.cumsum(kept, axis=1) - kept
    return tl.load(values + places, mask=kept == 1, other=0.0), starts + tl.sum(kept, axis=1)


@triton.jit
def _multiply(
    x, values, masks, offsets, bias, y, count, inputs, outputs, words,
    ROWS: tl.constexpr, OUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    outs = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    valid = outs < outputs
    starts = tl.load(offsets + outs, mask=valid, other=0)
    sums = tl.zeros((ROWS, OUTS), tl.float32)
    for first in range(0, inputs, INPUTS):
        columns = first + tl.arange(0, INPUTS)
        weights, starts = _tile(values, masks, starts, outs, valid, columns, words)
        inside = (rows < count)[:, None] & (columns < inputs)[None, :]
        sums = tl.dot(tl.load(x + rows[:, None] * inputs + columns[None, :], mask=inside, other=0.0), tl.trans(weights), sums)
    if bias is not None:
        sums += tl.load(bias + outs, mask=valid, other=0.0).to(tl.float32)[None, :]
    inside = (rows < count)[:, None] & valid[None, :]
    tl.store(y + rows[:, None] * outputs + outs[None, :], sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _decompress(
    values, masks, offsets, out, first, count, inputs, words, OUTS: tl.constexpr, INPUTS: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    valid = rows < count
    starts = tl.load(offsets + first + rows, mask=valid, other=0)
    for column in range(0, inputs, INPUTS):
        columns = column + tl.arange(0, INPUTS)
        weights, starts = _tile(values, masks, starts, first + rows, valid, columns, words)
        inside = valid[:, None] & (columns < inputs)[None, :]
        tl.store(out + rows[:, None] * inputs + columns[None, :], weights, mask=inside)
