"""Products of few rows on a CPU, in C++ (few_rows.cpp): bfloat16, weights dense or compressed to their non-zeros.

The library is built at install where a C++ compiler is present, and used where the processor has AVX-512 BF16 and VBMI2.
Callers ask `library()` first; where it is None they take torch's way. Nothing here is differentiable.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

log = logging.getLogger("espalier.kernels")

POINTER, COUNT, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES = {
    "dense": [POINTER] * 4 + [COUNT] * 3 + [INT],
    "sparse": [POINTER] * 6 + [COUNT] * 3 + [INT],
    "expand": [POINTER] * 4 + [COUNT] * 3 + [INT],
}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or this processor cannot run them; said once in the log."""
    spec = find_spec("models.kernels.few_rows")
    if spec is None or spec.origin is None:
        log.info("native CPU kernels were not built (no C++ compiler at install): small batches run through torch")
        return None
    found = ctypes.CDLL(spec.origin)  # after torch, whose OpenMP and so whose threads it then shares
    if not found.supported():
        log.info("this processor lacks AVX-512 BF16 or VBMI2: small batches run through torch")
        return None
    for name, types in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    log.info("native CPU kernels in use")
    return found


def dense(native: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in] times weight [out, in], transposed, plus bias [out]: [rows, out]. All bfloat16 on the CPU; weight contiguous."""
    x, (n, k) = x.contiguous(), weight.shape
    y = x.new_empty(len(x), n)
    native.dense(x.data_ptr(), weight.data_ptr(), _pointer(bias), y.data_ptr(), len(x), k, n, torch.get_num_threads())
    return y


def sparse(
    native: ctypes.CDLL, x: Tensor, values: Tensor, masks: Tensor, offsets: Tensor, bias: Tensor | None
) -> Tensor:
    """The same product with a weight as `models.linear.SparseLinear` holds it."""
    x, n = x.contiguous(), len(masks)
    y = x.new_empty(len(x), n)
    native.sparse(
        x.data_ptr(), values.data_ptr(), masks.data_ptr(), offsets.data_ptr(), _pointer(bias), y.data_ptr(),
        len(x), x.shape[1], n, torch.get_num_threads(),
    )  # fmt: skip
    return y


def expand(native: ctypes.CDLL, values: Tensor, masks: Tensor, offsets: Tensor, first: int, out: Tensor) -> Tensor:
    """Write the dense rows from `first` on to `out` [rows, in], contiguous bfloat16."""
    last = first + len(out)
    native.expand(
        values.data_ptr(), masks.data_ptr(), offsets.data_ptr(), out.data_ptr(), out.shape[1], first, last,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
