"""Which way a product is computed, by rows: every threshold of the products is in this file, with what was measured.

Times are of bfloat16 on a CPU with AMX at 1.1B geometry (2048 by 5632 or 11264), unless said otherwise.
"""

from __future__ import annotations

from typing import Literal

Format = Literal["dense", "packed"]

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
PACKED_AVX512 = 48
"""Rows of a packed weight's product without AMX; more are faster through dense parts. With AMX there is no limit."""
BITMASK_GPU = 16
"""Rows that a GPU multiplies from a bitmask weight. Not measured yet."""

DENSE_PART = 1024
"""Rows of W that are decompressed at a time, and stay in cache until they are multiplied: at 64 to 256 rows of x this takes 1.03 to
1.05 times as long as a dense weight, at 616 no longer; a part of 33 MB took 1.16 times as long at 160 rows."""

SPARSE_FROM = 0.3
"""Share of zeros from which a packed weight is faster than a dense one. With AMX: 0.70 to 0.95 times as long at 1, 4, 16, 64 and
168 rows, 1.07 and 0.98 at 616; with 0.2 of zeros 0.80 to 1.12. Without AMX: 0.70 and 0.86 at 1 and 4 rows, 1.1 to 1.2 at 8 and
more, however many zeros there are."""
TIMED_ROWS = (1, 16)
"""What is timed at load on a GPU. In any format prefill is bound by arithmetic, so only few rows are."""


def kernel(weight_format: Format, rows: int, amx: bool) -> str:
    """The C++ kernel that multiplies `rows` rows."""
    if not amx or rows < AMX_FROM[weight_format]:
        return "gemv_avx512"
    return "gemm_amx_small" if rows <= AMX_SMALL else "gemm_amx"


def dense_rows(inputs: int, amx: bool) -> int:
    """Rows up to which our kernels multiply faster than torch by a dense weight of so many inputs."""
    if amx:
        return min(DENSE_AMX, DENSE_AMX_VALUES // inputs)
    return DENSE_AVX512_NARROW if inputs <= NARROW_INPUTS else DENSE_AVX512
