"""The format in which a matrix is held: a sparse one where that was measured to be faster, dense everywhere else."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from models import kernels
from models.kernels import thresholds
from models.linear import Linear
from models.quantized import QUANTIZED, was_quantized
from models.sparse import AnyLinear, PackedLinear, SemiStructuredLinear, SparseLinear

log = logging.getLogger("espalier.weight_format")


def holder(module: str, quantization: str | None, saved: bool) -> Callable[[Linear], AnyLinear]:
    """How the matrices of `vision`, `projector` or `language` are held: quantized, or else in the fastest lossless format. Of a
    checkpoint that was `saved` quantized, those that it holds dense stay so.

    Vision tower and projector multiply hundreds of rows at a time, so that without quantization they stay dense.
    """
    lossless = choose_format if module == "language" else lambda linear: linear
    if quantization is None:
        return lossless
    quantize = QUANTIZED[quantization].of
    if not saved:
        return quantize
    return lambda linear: quantize(linear) if was_quantized(linear.weight, quantization) else lossless(linear)


SAMPLED_ROWS = 64
"""Where these have few zeros, the others are not counted: that would take as long as reading them."""


def choose_format(linear: Linear) -> AnyLinear:
    """The fastest format for a matrix of the language model, which decodes few rows at a time more often than many.

    On a CPU by its zeros; on a GPU by timing. The dense weight may be freed when this returns.
    """
    least = thresholds.SPARSE_FROM
    if _zeros(linear.weight[:: max(1, len(linear.weight) // SAMPLED_ROWS)]) < least / 2 or _zeros(linear.weight) < least:
        return linear
    if linear.weight.is_cuda:
        return faster(linear, SemiStructuredLinear if is_2_4(linear.weight) else SparseLinear)
    if linear.weight.dtype != torch.bfloat16:
        _log_once(f"pruned weights in {linear.weight.dtype} stay dense on a CPU; serve them with --dtype bfloat16")
        return linear
    if not kernels.library():
        return linear
    return PackedLinear.of(linear)


def _zeros(weight: Tensor) -> float:
    return 1 - int(weight.count_nonzero()) / weight.numel()


def is_2_4(weight: Tensor) -> bool:
    """Whether no aligned four weights of a row [out, in] hold more than two non-zeros."""
    return weight.shape[1] % 4 == 0 and bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all())


def faster(linear: Linear, kind: type[SparseLinear] | type[SemiStructuredLinear]) -> AnyLinear:
    """The matrix as `kind` if that works here and is faster at all TIMED_ROWS; else the dense one, and the log says why."""
    name = f"{kind.format} of {tuple(linear.weight.shape)}"
    try:
        sparse = kind.of(linear)
        slower = [rows for rows in thresholds.TIMED_ROWS if seconds(sparse, rows) >= seconds(linear, rows)]
    except Exception as error:  # whatever a driver, a compiler or a shape may raise
        _log_once(f"{name} does not work here, so it stays dense: {error}")
        return linear
    if slower:
        _log_once(f"{name} stays dense, which was measured to be faster at {slower[0]} rows")
        return linear
    return sparse


def seconds(matrix: Linear | SparseLinear | SemiStructuredLinear, rows: int) -> float:
    """Mean time of one product, after a warm-up."""
    like = matrix.values if isinstance(matrix, SparseLinear) else matrix.weight
    inputs = matrix.inputs if isinstance(matrix, SparseLinear) else matrix.weight.shape[1]
    x = torch.ones(rows, inputs, dtype=like.dtype, device=like.device)
    with torch.inference_mode():
        return float(Timer("matrix(x)", globals={"matrix": matrix, "x": x}).timeit(50).mean)


_log_once = cache(log.info)
