"""GPTQ (Frantar et al. 2023, arXiv 2210.17323) on NF4's grid: round one column after another, and let those that are not yet
rounded make up for what that changed. It needs the inverse Hessian that `obs` does, which makes zeros and not values of a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.quantized import BLOCK, nf4_values
from pruning.static import obs
from pruning.static.obs import BLOCK_SIZE, Factor, Hessian

empty, accumulate = obs.empty, obs.accumulate


@dataclass
class OrderedFactor(Factor):
    """Of the Hessian in the order in which columns are rounded: those with large inputs first, while most others can make up."""

    order: Tensor  # [in] int64


def prepare(statistics: Hessian) -> OrderedFactor:
    """Raises what `obs.prepare` raises."""
    order = statistics.matrix.diagonal().argsort(descending=True, stable=True)
    factor = obs.prepare(Hessian(statistics.matrix[order][:, order], statistics.rows))
    return OrderedFactor(**vars(factor), order=order)


def round_nf4(weight: Tensor, prepared: OrderedFactor, block_size: int = BLOCK_SIZE) -> Tensor:
    """The weight [out, in] with values of NF4 alone, in the dtype it came in; zeros stay zeros.

    Per column i in order: rounding leaves the error e = (w - q) / U_ii, and every later column j changes by -e U_ij. Blocks of
    weights have the scales that rounding to nearest gives them, chosen before any weight changes, so that the order is free. The
    largest weight of a block stays so: its magnitude is the scale, and what reads the values finds the same codes.
    Raises ValueError where blocks do not fill the matrix.
    """
    order, upper = prepared.order, prepared.upper
    scales, largest = (part[:, order] for part in _blocks(weight))
    pending = weight.float()[:, order]
    zeros, rounded = pending == 0, torch.empty_like(pending)
    values = nf4_values(weight.device)
    midpoints = (values[1:] + values[:-1]) / 2
    columns = pending.shape[1]
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        errors = pending.new_empty(len(pending), last - first)
        for i in range(first, last):
            column, scale = pending[:, i], scales[:, i]
            nearest = values[torch.bucketize(column / scale, midpoints)]
            nearest = nearest.where(~largest[:, i], column.sign())
            rounded[:, i] = (nearest * scale).masked_fill(zeros[:, i], 0)
            error = errors[:, i - first] = (column - rounded[:, i]) / upper[i, i]
            pending[:, i + 1 : last].addr_(error, upper[i, i + 1 : last], alpha=-1)
        pending[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return torch.empty_like(rounded).index_copy_(1, order, rounded).to(weight.dtype)


def _blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each weight's block, 1 where that is all zeros, float32 [out, in]; and whether a weight is the one that has it,
    bool [out, in]. A block is BLOCK weights in a row, or in two where a row ends within it."""
    if weight.numel() % BLOCK:
        raise ValueError(f"{weight.shape[0]} x {weight.shape[1]} weights do not divide into NF4's blocks of {BLOCK}")
    magnitudes = weight.float().abs().reshape(-1, BLOCK)
    scales, places = magnitudes.max(1, keepdim=True)
    largest = torch.zeros_like(magnitudes, dtype=torch.bool).scatter_(1, places, True)
    scales = scales.where(scales > 0, 1.0).expand_as(magnitudes)
    return scales.reshape(weight.shape), largest.view(weight.shape)
