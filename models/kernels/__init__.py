"""C++ kernels for the CPU, in bfloat16 unless said otherwise.

- gemv_avx512.cpp and gemm_avx512.cpp: products with a dense, a packed or a 4-bit weight; gemm_amx_small.cpp and gemm_amx.cpp:
  with the first two. `thresholds` says which runs when.
- int8.cpp: products with a weight of 8 bits, of rows that are rounded to 8 bits; for prompts and for a decoding step.
- decode*.cpp: a whole decoding step in one call (`models.decode`), in bfloat16 or float32, on AVX-512 and on any other processor.
- attention.cpp: attention of many rows, in float32.
- convolution.cpp: an inverted bottleneck of EfficientNet in one pass, in float32 (`models.vision.convolution`).
- elementwise.cpp: RMS norm, swish and RoPE, one pass each.

The library is built at install where a C++ compiler is present. All but decoding needs AVX-512 BF16, VBMI, VBMI2 and VNNI.
Callers ask `library()` first, or for decoding `decoding_library()`, and run through torch where it is None. No kernel is
differentiable.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from models.kernels import thresholds

log = logging.getLogger("espalier.kernels")

POINTER, COUNT, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
Signatures = dict[str, list[Any]]
PRODUCT = [POINTER] * 4 + [COUNT] * 3 + [INT]
SIGNATURES: Signatures = {
    "dense_gemv_avx512": PRODUCT,
    "packed_gemv_avx512": PRODUCT,
    "dense_gemm_avx512": PRODUCT,
    "packed_gemm_avx512": PRODUCT,
    "decompress": [POINTER] * 2 + [COUNT] * 3 + [INT],
    "rms_norm": [POINTER] * 3 + [COUNT] * 2 + [FLOAT, INT],
    "swish": [POINTER] * 3 + [COUNT] * 3 + [FLOAT, INT],
    "apply_rope": [POINTER] * 4 + [COUNT] * 4 + [INT],
}
UNROUNDED_SIGNATURES: Signatures = {"dense_gemv_avx512_to_float32": PRODUCT}
CONVOLUTION_SIGNATURES: Signatures = {"inverted_bottleneck": [POINTER, POINTER, COUNT, INT]}
ATTENTION_SIGNATURES: Signatures = {"attend_rows": [POINTER] * 5 + [COUNT] * 7 + [FLOAT] + [INT] * 3}
FEW_BITS_SIGNATURES: Signatures = {
    "int8_linear": [POINTER] * 4 + [COUNT] * 3 + [INT] * 2,
    "nf4_gemv_avx512": PRODUCT,
    "nf4_gemm_avx512": PRODUCT,
    "decompress_nf4": [POINTER] * 2 + [COUNT] * 3 + [INT],
}
AMX_SIGNATURES: Signatures = {
    f"{weight}_{gemm}": PRODUCT for weight in ("dense", "packed") for gemm in ("gemm_amx", "gemm_amx_small")
}


@cache
def _built() -> ctypes.CDLL | None:
    spec = find_spec("models.kernels.native")
    if spec is None or spec.origin is None:
        log.info("native CPU kernels were not built (no C++ compiler at install): the CPU runs through torch alone")
        return None
    return ctypes.CDLL(spec.origin)  # after torch, whose OpenMP and so whose threads it then shares


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or this processor cannot run them. The log says which, once."""
    if (found := _built()) is None:
        return None
    if not found.avx512_supported():
        log.info("this processor lacks AVX-512 BF16, VBMI, VBMI2 or VNNI: products run through torch")
        return None
    amx = bool(found.amx_supported())
    _declare(found, SIGNATURES | (AMX_SIGNATURES if amx else {}))
    log.info("native CPU kernels in use%s", ", with AMX" if amx else "")
    return found


@cache
def decoding_library() -> ctypes.CDLL | None:
    """The same with `run_few_rows` alone, which runs on any processor but x86-64 without AVX2."""
    found = _built()
    if found is not None and not hasattr(found, "run_few_rows"):
        log.warning("native CPU kernels were built from older sources, and decoding is slower: install again")
        return None
    if found is None or not found.portable_supported():
        return None
    found.run_few_rows.argtypes, found.run_few_rows.restype = [POINTER, POINTER, COUNT, POINTER, INT], None
    return found


@cache
def convolution_library() -> ctypes.CDLL | None:
    """The same with `inverted_bottleneck`, which needs AVX-512."""
    return _library_with(CONVOLUTION_SIGNATURES, "convolutions are")


@cache
def few_bits_library() -> ctypes.CDLL | None:
    """The same with products of 8-bit and 4-bit weights, and with such weights in `run_few_rows`."""
    return _library_with(FEW_BITS_SIGNATURES, "quantized weights are")


@cache
def unrounded_library() -> ctypes.CDLL | None:
    """The same with products whose sums are not rounded."""
    return _library_with(UNROUNDED_SIGNATURES, "first tokens are")


@cache
def attention_library() -> ctypes.CDLL | None:
    """The same with `attend_rows`."""
    return _library_with(ATTENTION_SIGNATURES, "attention of prompts is")


def _library_with(signatures: Signatures, what: str) -> ctypes.CDLL | None:
    """`library()`, unless it was built before it had these functions: the log then says `what` is slower."""
    if (found := library()) is None:
        return None
    if not all(hasattr(found, name) for name in signatures):
        log.warning("native CPU kernels were built from older sources, and %s slower: install again", what)
        return None
    _declare(found, signatures)
    return found


def _declare(native: ctypes.CDLL, signatures: Signatures) -> None:
    for name, types in signatures.items():
        function = getattr(native, name)
        function.argtypes, function.restype = types, None


@cache
def many_rows() -> thresholds.ManyRows:
    """What multiplies many rows fastest on this processor."""
    if (native := library()) is None:
        return "bfloat16"
    return "amx" if native.amx_supported() else "float32" if native.float32_faster() else "bfloat16"


def dense_linear(native: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in] times weight [out, in], transposed, plus bias [out]: [rows, out]. All bfloat16 on the CPU; weight contiguous."""
    x, (n, k) = x.contiguous(), weight.shape
    y = x.new_empty(len(x), n)
    product = _product(native, "dense", len(x))
    product(x.data_ptr(), weight.data_ptr(), _pointer(bias), y.data_ptr(), len(x), k, n, torch.get_num_threads())
    return y


def unrounded_linear(native: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same product in float32: its sums are not rounded."""
    x, (n, k) = x.contiguous(), weight.shape
    y = x.new_empty(len(x), n, dtype=torch.float32)
    native.dense_gemv_avx512_to_float32(
        x.data_ptr(), weight.data_ptr(), _pointer(bias), y.data_ptr(), len(x), k, n, torch.get_num_threads()
    )  # fmt: skip
    return y


def packed_linear(native: ctypes.CDLL, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The same product with a packed weight, given as the tensors of `models.sparse.PackedLinear`."""
    x, weight, n = x.contiguous(), packed_table(parts), len(parts[-1]) - 1
    y = x.new_empty(len(x), n)
    product = _product(native, "packed", len(x))
    product(x.data_ptr(), weight, _pointer(bias), y.data_ptr(), len(x), x.shape[1], n, torch.get_num_threads())
    return y


class Int8Weight(ctypes.Structure):
    """`Weight` of int8.h."""

    _fields_ = [("codes", POINTER), ("scales", POINTER), ("sums", POINTER), ("outlier", FLOAT)]


def int8_linear(native: ctypes.CDLL, x: Tensor, weight: Int8Weight, outputs: int, bias: Tensor | None) -> Tensor:
    """The same product with a weight of 8 bits. x and bias [out] may be float32 too."""
    x, bf16 = x.contiguous(), x.dtype == torch.bfloat16
    y, table = x.new_empty(len(x), outputs), ctypes.byref(weight)
    native.int8_linear(x.data_ptr(), table, _pointer(bias), y.data_ptr(), *x.shape, outputs, bf16, torch.get_num_threads())
    return y


class Nf4Weight(ctypes.Structure):
    """`Nf4` of weights.h."""

    _fields_ = [("codes", POINTER), ("scales", POINTER), ("values", POINTER), ("inputs", COUNT)]


def nf4_linear(native: ctypes.CDLL, x: Tensor, weight: Nf4Weight, outputs: int, bias: Tensor | None) -> Tensor:
    """The same product with a weight of 4 bits."""
    x = x.contiguous()
    y, product = x.new_empty(len(x), outputs), _product(native, "nf4", len(x))
    product(x.data_ptr(), ctypes.byref(weight), _pointer(bias), y.data_ptr(), *x.shape, outputs, torch.get_num_threads())
    return y


def decompress_nf4(native: ctypes.CDLL, weight: Nf4Weight, outputs: int, inputs: int) -> Tensor:
    """The dense weight [outputs, inputs] in bfloat16."""
    out = torch.empty(outputs, inputs, dtype=torch.bfloat16)
    native.decompress_nf4(ctypes.byref(weight), out.data_ptr(), inputs, 0, outputs, torch.get_num_threads())
    return out


def decompress(native: ctypes.CDLL, parts: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
    """Write the dense rows from `first` on to `out` [rows, in], contiguous bfloat16."""
    native.decompress(packed_table(parts), out.data_ptr(), out.shape[1], first, first + len(out), torch.get_num_threads())
    return out


def attend_rows(
    native: ctypes.CDLL, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, scale: float, *, causal: bool
) -> Tensor:
    """As `models.attention.attend`, of the last rows; all bfloat16 or float32 on the CPU, multiplied in float32."""
    (rows, heads, dim), (kv_heads, length, _) = query.shape, keys.shape
    if query.stride()[1:] != (dim, 1):
        query = query.contiguous()
    if keys.stride() != values.stride() or keys.stride()[1:] != (dim, 1):
        keys, values = keys.contiguous(), values.contiguous()
    out = query.new_empty(rows, heads, dim)
    native.attend_rows(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), _pointer(None if bias is None else bias.contiguous()),
        out.data_ptr(), query.stride(0), keys.stride(0), rows, length, heads, kv_heads, dim, scale, causal,
        query.dtype == torch.bfloat16, torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm(native: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of x [rows, width] times weight [width], both bfloat16 on the CPU."""
    x = x.contiguous()
    y = torch.empty_like(x)
    native.rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape, eps, torch.get_num_threads())
    return y


def swish(native: ctypes.CDLL, x: Tensor, up: Tensor | None, beta: float) -> Tensor:
    """x sigmoid(beta x) (Ramachandran et al. 2017, arXiv 1710.05941), times `up` if there is one, all bfloat16 on the CPU.

    Both [rows, width] with the same strides, values of a row side by side.
    """
    y = x.new_empty(x.shape)
    native.swish(x.data_ptr(), _pointer(up), y.data_ptr(), *x.shape, x.stride(0), beta, torch.get_num_threads())
    return y


def apply_rope(native: ctypes.CDLL, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [rows, heads, dim] by cos and sin [rows, 1, dim / 2], all bfloat16 on the CPU.

    Heads of a row lie side by side; rows may be any distance apart.
    """
    rows, heads, dim = x.shape
    y = x.new_empty(x.shape)
    native.apply_rope(
        x.data_ptr(), cos.contiguous().data_ptr(), sin.contiguous().data_ptr(), y.data_ptr(), rows, heads, dim // 2, x.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _product(native: ctypes.CDLL, weight_format: thresholds.Format, rows: int) -> Callable[..., None]:
    """The function that multiplies so many rows by a weight of this format."""
    found: Callable[..., None] = getattr(native, f"{weight_format}_{thresholds.kernel(weight_format, rows, many_rows())}")
    return found


def packed_table(parts: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """weights.h's `Packed`: where the parts lie, and how many words of masks a row has."""
    *_, masks, _ = parts
    return (COUNT * (len(parts) + 1))(*(part.data_ptr() for part in parts), masks.shape[1])


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
