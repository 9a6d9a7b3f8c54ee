"""The format in which a matrix is held: a sparse one where that was measured to be faster, dense everywhere else."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from models import kernels
from models.kernels import thresholds
from models.linear import Linear
from models.sparse import AnyLinear, PackedLinear, SemiStructuredLinear, SparseLinear

log = logging.getLogger("espalier.weight_format")


def choose_format(linear: Linear) -> AnyLinear:
    """The fastest form for a matrix of the language model, which meets few rows at a time more often than many.

    On a CPU by its zeros; on a GPU by the clock. The dense weight may be let go when this returns.
    """
    if linear.nonzeros > (1 - thresholds.SPARSE_FROM) * linear.size:
        return linear
    if linear.weight.is_cuda:
        return faster(linear, SemiStructuredLinear if is_2_4(linear.weight) else SparseLinear)
    if linear.weight.dtype != torch.bfloat16:
        _say_once(f"pruned weights in {linear.weight.dtype} stay dense on a CPU; serve them with --dtype bfloat16")
        return linear
    if not kernels.library():
        return linear
    return PackedLinear.of(linear)


def is_2_4(weight: Tensor) -> bool:
    """Whether no aligned four weights of a row [out, in] hold more than two non-zeros."""
    return weight.shape[1] % 4 == 0 and bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all())


def faster(linear: Linear, form: type[SparseLinear] | type[SemiStructuredLinear]) -> AnyLinear:
    """The matrix in `form` if it can be had and is the faster one at each of TIMED_ROWS; else as it is, and the log says why."""
    name = f"{form.format} of {tuple(linear.weight.shape)}"
    try:
        sparse = form.of(linear)
        slower = [rows for rows in thresholds.TIMED_ROWS if seconds(sparse, rows) >= seconds(linear, rows)]
    except Exception as error:  # whatever a driver, a compiler or a shape may bring up
        _say_once(f"{name} cannot be had here, so it stays dense: {error}")
        return linear
    if slower:
        _say_once(f"{name} stays dense, which was measured to be faster at {slower[0]} rows")
        return linear
    return sparse


def seconds(matrix: Linear | SparseLinear | SemiStructuredLinear, rows: int) -> float:
    """Of one product, mean over some after a warm-up."""
    like = matrix.values if isinstance(matrix, SparseLinear) else matrix.weight
    inputs = matrix.inputs if isinstance(matrix, SparseLinear) else matrix.weight.shape[1]
    x = torch.ones(rows, inputs, dtype=like.dtype, device=like.device)
    with torch.inference_mode():
        return float(Timer("matrix(x)", globals={"matrix": matrix, "x": x}).timeit(50).mean)


_say_once = cache(log.info)
