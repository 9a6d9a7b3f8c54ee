"""Which form a matrix takes at load: a sparse one where that was measured to be faster, the dense one everywhere else."""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from models import kernels
from models.linear import Linear
from models.sparse import Matrix, PackedLinear, SemiStructuredLinear, SparseLinear

log = logging.getLogger("espalier.forms")

BREAK_EVEN = 0.3
"""Share of zeros from which the packed form is the faster one on a CPU with AMX.

With 0.3 of zeros 1, 4, 16, 64 and 168 rows take 0.70 to 0.95 times as long as of a dense matrix (2048 to 11264 and 5632 to 2048),
and 616 rows of a prompt 1.07 and 0.98 times; with 0.2 it is 0.80 to 1.12. Without AMX 1 and 4 rows take 0.70 and 0.86 times as
long, 8 and more 1.1 to 1.2 times, however many zeros there are.
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
    return PackedLinear.of(linear)


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


def seconds(matrix: Linear | SparseLinear | SemiStructuredLinear, rows: int) -> float:
    """Of one product, mean over some after a warm-up."""
    like = matrix.values if isinstance(matrix, SparseLinear) else matrix.weight
    inputs = matrix.inputs if isinstance(matrix, SparseLinear) else matrix.weight.shape[1]
    x = torch.ones(rows, inputs, dtype=like.dtype, device=like.device)
    with torch.inference_mode():
        return float(Timer("matrix(x)", globals={"matrix": matrix, "x": x}).timeit(50).mean)


_say_once = cache(log.info)
