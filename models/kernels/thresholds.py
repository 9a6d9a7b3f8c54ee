"""Which way a product is computed, by rows: every threshold of the products is in this file, with what was measured.

Times are of bfloat16 on a CPU with AMX at 1.1B geometry (2048 by 5632 or 11264), unless said otherwise.
"""

from __future__ import annotations

from typing import Literal

Format = Literal["dense", "packed", "nf4"]
ManyRows = Literal["amx", "float32", "bfloat16"]
"""What multiplies many rows fastest: the tiles of AMX, our float32 products, or torch's in bfloat16."""

AMX_FROM = {"dense": 3, "packed": 2}
"""Rows from which the AMX kernels are faster than gemv_avx512."""
AMX_SMALL = 16
"""Rows up to which gemm_amx_small is faster than gemm_amx: with a packed weight 1.5 times at 4 rows, 1.2 times at 8 and 16."""
AMX_SMALL_SPLIT = 4
"""Rows up to which gemm_amx_small sums an output in four parts, so that results differ in the last bit from those of more rows."""

DENSE_AMX, DENSE_AMX_VALUES = 240, 560 << 10
"""Rows, and values in all of them, up to which our kernels are faster than torch for a dense weight: up to 4 times at 16 rows, 1.1
to 1.3 times at 168 rows of 2048. Beyond, they take 0.95 to 1.1 times as long."""
DENSE_AVX512, DENSE_AVX512_NARROW, NARROW_INPUTS = 8, 32, 2048
"""The same without AMX: any weight, and one of at most so many inputs (8 rows of x then stay in a first-level cache of 48 KB)."""
FLOAT32_FROM = 25
"""Rows from which gemm_avx512 multiplies where float32 is faster. On a Xeon without AMX, dense and with half the weights zero, in
GFLOP/s of one core: gemv_avx512 84 and 66 at 24 rows, 80 and 67 at 32; gemm_avx512 78 and 64 at 24, 110 and 80 at 32, 148 and 180
at 616. torch reaches 70 to 80 in bfloat16 and 160 in float32."""
PACKED = {"amx": 640, "bfloat16": 48}
"""Rows up to which our kernels multiply a packed weight; more are faster through dense parts."""
NF4_ROWS = 48
"""The same for a weight of 4 bits, where float32 is not faster."""
DECODE_ROWS = {"amx": 8, "float32": 64, "bfloat16": 64, "portable": 32}
"""Rows of answers and of prompts, or parts of them, that run in one native call; more run layer by layer. Ms on two threads of a
Xeon without AMX, `smol-135m`, a prompt of 31, 48, 63 and 111 rows: 49, 72, 93 and 180, layer by layer 81, 96, 122 and 179: threads
that wait passively are slow to wake between products. 40 answers behind 600 rows, one thread: 218, layer by layer 403. On a Zen 5,
bfloat16, `tinyllava-1.1b`, a prompt of 32, 63, 96 and 256 rows: 121, 219, 329 and 849, layer by layer 147, 219, 299 and 651. With
AMX, whose tiles that call does not use: not measured."""
DECODE_ROWS_NARROW, NARROW_MODEL = 160, 1024
"""The same in bfloat16 of a model of at most so many hidden dimensions, whose products take less time than to wake a thread.
`smol-135m` on a Zen 5, a prompt of 32, 63, 80, 111, 160 and 320 rows: 15, 23, 29, 54, 77 and 155 ms; layer by layer 35, 56, 62, 71,
89 and 158."""
DECODE_ROWS_INT8 = 128
"""The same where weights have 8 bits: 16, 24, 27 and 68 ms, at 208 rows 127; layer by layer 39, 48, 57, 94 and 136."""
BITMASK_GPU = 16
"""Rows that a GPU multiplies from a bitmask weight. Not measured yet."""

DENSE_PART = 1024
"""Rows of W that are decompressed at a time, and stay in cache until they are multiplied: at 64 to 256 rows of x this takes 1.03 to
1.05 times as long as a dense weight, at 616 no longer; a part of 33 MB took 1.16 times as long at 160 rows."""

SPARSE_FROM = 0.3
"""Share of zeros from which a packed weight is faster than a dense one. With AMX: 0.70 to 0.95 times as long at 1, 4, 16, 64 and
168 rows, 1.07 and 0.98 at 616; with 0.2 of zeros 0.80 to 1.12. Without AMX: 0.70 and 0.86 at 1 and 4 rows, 1.1 to 1.3 at 8 and
more, however many zeros there are; but where float32 is faster zeros are left out from 65 rows on, and half of them give 0.80."""
TIMED_ROWS = (1, 16)
"""What is timed at load on a GPU. In any format prefill is bound by arithmetic, so only few rows are."""


def decode_rows(width: int, many_rows: ManyRows | Literal["portable"], *, int8: bool) -> int:
    """Rows up to which a model of `width` hidden dimensions runs in one native call; `portable`: without AVX-512."""
    if int8:
        return DECODE_ROWS_INT8
    narrow = many_rows == "bfloat16" and width <= NARROW_MODEL
    return DECODE_ROWS_NARROW if narrow else DECODE_ROWS[many_rows]


def kernel(weight_format: Format, rows: int, many_rows: ManyRows) -> str:
    """The C++ kernel that multiplies `rows` rows."""
    if many_rows == "amx" and weight_format != "nf4" and rows >= AMX_FROM[weight_format]:
        return "gemm_amx_small" if rows <= AMX_SMALL else "gemm_amx"
    return "gemm_avx512" if many_rows == "float32" and rows >= FLOAT32_FROM else "gemv_avx512"


def ours(weight_format: Format, rows: int, inputs: int, many_rows: ManyRows) -> bool:
    """Whether our kernels multiply so many rows by a weight of so many inputs, rather than torch."""
    if many_rows == "float32":
        return True
    if weight_format == "nf4":
        return rows <= NF4_ROWS
    if weight_format == "packed":
        return rows <= PACKED[many_rows]
    if many_rows == "amx":
        return rows <= min(DENSE_AMX, DENSE_AMX_VALUES // inputs)
    return rows <= (DENSE_AVX512_NARROW if inputs <= NARROW_INPUTS else DENSE_AVX512)
