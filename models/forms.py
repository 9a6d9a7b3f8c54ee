"""Which form a matrix takes at load: a sparse one where that was measured to be faster, the dense one everywhere else."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from models import kernels
from models.linear import Linear, Matrix, SemiStructuredLinear, SparseLinear

log = logging.getLogger("espalier.forms")

BREAK_EVEN = 0.4
"""Share of zeros from which the bitmask is the faster form on a CPU for any 1 to 32 rows.

Of a 2048 x 5632 (out x in) matrix with 0.3 of zeros, 32 rows took 1.05 times as long as of a dense one and one row 0.90 times;
with 0.4 they took 0.95 and 0.79 times as long. On tiles (2048 x 11264) 1 to 64 rows take 0.87 to 0.95 times as long with 0.2
of zeros and 0.73 to 0.84 with 0.4, but 616 rows of a prompt 1.12, 1.08 and 1.02 times with 0.2, 0.3 and 0.4.
"""
DECODE_ROWS = (1, 16)
"""What is timed on a GPU, which differ more than CPUs with these instructions do. Prefill is arithmetic in any form."""


def choose(linear: Linear) -> Matrix:
    """The fastest form for a matrix of the language model, which meets few rows at a time more often than many.

    On a CPU by its zeros; on a GPU by the clock. The dense weight may be let go when this returns.
    """
    if linear.nonzeros > (1 - BREAK_EVEN) * linear.size:
        return linear
    if linear.weight.is_cuda:
        return faster(linear, SemiStructuredLinear if is_2_4(linear.weight) else SparseLinear)
    if linear.weight.dtype != torch.bfloat16:
        _say_once(f"pruned weights in {linear.weight.dtype} stay dense on a CPU; serve them with --dtype bfloat16")
        return linear
    if not kernels.library():
        return linear
    return SparseLinear.of(linear)


def is_2_4(weight: Tensor) -> bool:
    """Whether no aligned four weights of a row [out, in] hold more than two non-zeros."""
    return weight.shape[1] % 4 == 0 and bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all())


def faster(linear: Linear, form: type[SparseLinear] | type[SemiStructuredLinear]) -> Matrix:
    """The matrix in `form` if it can be had and is the faster one at each of DECODE_ROWS; else as it is, and the log says why."""
    name = f"{form.form} of {tuple(linear.weight.shape)}"
    try:
        sparse = form.of(linear)
        slower = [rows for rows in DECODE_ROWS if seconds(sparse, rows) >= seconds(linear, rows)]
    except Exception as error:  # whatever a driver, a compiler or a shape may bring up
        _say_once(f"{name} cannot be had here, so it stays dense: {error}")
        return linear
    if slower:
        _say_once(f"{name} stays dense, which was measured to be faster at {slower[0]} rows")
        return linear
    return sparse


def seconds(matrix: Matrix, rows: int) -> float:
    """Of one product, mean over some after a warm-up."""
    like = matrix.values if isinstance(matrix, SparseLinear) else matrix.weight
    inputs = matrix.inputs if isinstance(matrix, SparseLinear) else matrix.weight.shape[1]
    x = torch.ones(rows, inputs, dtype=like.dtype, device=like.device)
    with torch.inference_mode():
        return float(Timer("matrix(x)", globals={"matrix": matrix, "x": x}).timeit(50).mean)


_say_once = cache(log.info)
