"""Products on a CPU, in C++: bfloat16, weights dense or packed to their non-zeros.

Few rows are multiplied on vectors (few_rows.cpp), more of them on the tiles of AMX where there are any (few_tiles.cpp up to
sixteen, tiles.cpp beyond), the new rows of a decoding step attend in one call (decode.cpp), and what happens between products is
one pass each (rows.cpp). The library is built at install where a C++ compiler is present, and used where the processor has AVX-512
BF16, VBMI and VBMI2. Callers ask `library()` first; where it is None they take torch's way. Nothing here is differentiable.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

log = logging.getLogger("espalier.kernels")

TILED_FROM = {"dense": 3, "packed": 2}
"""Rows from which tiles are faster than vectors."""
PARTED, FEW_TILED = 4, 16
"""Rows up to which one is several columns of a tile, and up to which W is laid out in the first-level cache (few_tiles.cpp)."""
POINTER, COUNT, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "dense": [POINTER] * 4 + [COUNT] * 3 + [INT],
    "packed": [POINTER] * 4 + [COUNT] * 3 + [INT],
    "expand": [POINTER] * 2 + [COUNT] * 3 + [INT],
    "decode": [POINTER, COUNT, POINTER, POINTER] + [COUNT] * 4 + [FLOAT, INT],
    "norm": [POINTER] * 3 + [COUNT] * 2 + [FLOAT, INT],
    "gate": [POINTER] * 3 + [COUNT] * 3 + [FLOAT, INT],
    "rotate": [POINTER] * 4 + [COUNT] * 4 + [INT],
}
TILED_SIGNATURES = {f"{name}{kind}": SIGNATURES[name] for name in ("dense", "packed") for kind in ("_tiles", "_few_tiles")}
DECODE_DIM = 32
"""What a head's width is a multiple of, where `decode` takes it: the values that a register holds."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built or this processor cannot run them; said once in the log."""
    spec = find_spec("models.kernels.native")
    if spec is None or spec.origin is None:
        log.info("native CPU kernels were not built (no C++ compiler at install): small batches run through torch")
        return None
    found = ctypes.CDLL(spec.origin)  # after torch, whose OpenMP and so whose threads it then shares
    if not found.supported():
        log.info("this processor lacks AVX-512 BF16, VBMI or VBMI2: small batches run through torch")
        return None
    tiled = bool(found.tiles_supported())
    for name, types in (SIGNATURES | (TILED_SIGNATURES if tiled else {})).items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, None
    log.info("native CPU kernels in use%s", ", with AMX" if tiled else "")
    return found


@cache
def tiles() -> bool:
    """Whether the library multiplies any number of rows, on tiles."""
    native = library()
    return native is not None and bool(native.tiles_supported())


def dense(native: ctypes.CDLL, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, in] times weight [out, in], transposed, plus bias [out]: [rows, out]. All bfloat16 on the CPU; weight contiguous."""
    x, (n, k) = x.contiguous(), weight.shape
    y = x.new_empty(len(x), n)
    product = _product(native, "dense", x)
    product(x.data_ptr(), weight.data_ptr(), _pointer(bias), y.data_ptr(), len(x), k, n, torch.get_num_threads())
    return y


def packed(native: ctypes.CDLL, x: Tensor, parts: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The same product with the parts of a packed weight, as `models.sparse.PackedLinear` holds them."""
    x, weight, n = x.contiguous(), _packed(parts), len(parts[-1]) - 1
    y = x.new_empty(len(x), n)
    product = _product(native, "packed", x)
    product(x.data_ptr(), weight, _pointer(bias), y.data_ptr(), len(x), x.shape[1], n, torch.get_num_threads())
    return y


def expand(native: ctypes.CDLL, parts: Sequence[Tensor], first: int, out: Tensor) -> Tensor:
    """Write the dense rows from `first` on to `out` [rows, in], contiguous bfloat16."""
    native.expand(_packed(parts), out.data_ptr(), out.shape[1], first, first + len(out), torch.get_num_threads())
    return out


def decodes(query: Tensor) -> bool:
    """Whether `decode` takes rows like these [..., dim]."""
    return query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[-1] % DECODE_DIM == 0


def decode(
    native: ctypes.CDLL, query: Tensor, seen: Sequence[tuple[Tensor, Tensor]], biases: Sequence[Tensor | None], scale: float
) -> Tensor:
    """Attention of one row of each request, query [requests, heads, dim], over that request's keys and values, seen
    [kv_heads, length, dim] each with rows that follow one another, and a bias [length] on its scores or None: as query.

    All bfloat16 on the CPU; dim a multiple of DECODE_DIM.
    """
    requests, heads, dim = query.shape
    words: list[int | None] = []
    for (keys, values), bias in zip(seen, biases, strict=True):
        words += (keys.data_ptr(), values.data_ptr(), _pointer(bias), keys.shape[1], keys.stride(0), values.stride(0))
    out = query.new_empty(requests, heads, dim)
    table = (COUNT * len(words))(*(word or 0 for word in words))
    native.decode(
        query.data_ptr(), query.stride(0), table, out.data_ptr(), requests, heads, len(seen[0][0]), dim, scale,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def norm(native: ctypes.CDLL, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of x [rows, width] times weight [width], both bfloat16 on the CPU."""
    x = x.contiguous()
    y = torch.empty_like(x)
    native.norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape, eps, torch.get_num_threads())
    return y


def gate(native: ctypes.CDLL, x: Tensor, up: Tensor | None, slope: float) -> Tensor:
    """x sigmoid(slope x), times `up` if there is one, all bfloat16 on the CPU.

    Both [rows, width], a row's values side by side, and rows as far apart in one as in the other.
    """
    y = x.new_empty(x.shape)
    native.gate(x.data_ptr(), _pointer(up), y.data_ptr(), *x.shape, x.stride(0), slope, torch.get_num_threads())
    return y


def rotate(native: ctypes.CDLL, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of x [rows, heads, dim] by cos and sin [rows, 1, dim / 2], all bfloat16 on the CPU; heads side by
    side, rows of x any distance apart."""
    rows, heads, dim = x.shape
    y = x.new_empty(x.shape)
    native.rotate(
        x.data_ptr(), cos.contiguous().data_ptr(), sin.contiguous().data_ptr(), y.data_ptr(), rows, heads, dim // 2, x.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def _product(native: ctypes.CDLL, form: str, x: Tensor) -> Callable[..., None]:
    """The function that multiplies so many rows by a weight of this form."""
    few = len(x) < TILED_FROM[form] or not tiles()
    found: Callable[..., None] = getattr(native, form if few else f"{form}_few_tiles" if len(x) <= FEW_TILED else f"{form}_tiles")
    return found


def _packed(parts: Sequence[Tensor]) -> ctypes.Array[ctypes.c_int64]:
    """weights.h's `Packed`: where the parts lie, and how many words of masks a row has."""
    *_, masks, _ = parts
    return (COUNT * (len(parts) + 1))(*(part.data_ptr() for part in parts), masks.shape[1])


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
