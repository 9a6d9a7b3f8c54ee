"""Native products with 8-bit weights against LLM.int8()'s arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import kernels
from models.linear import Linear
from models.quantized import OUTLIER, Int8Linear

pytestmark = pytest.mark.skipif(kernels.few_bits_library() is None, reason="needs AVX-512 with VNNI")
MANY = 8  # rows from which codes are laid out anew: see int8.cpp


def matrix(outputs: int, inputs: int, dtype: torch.dtype, bias: bool = True) -> Int8Linear:
    torch.manual_seed(outputs * inputs)
    return Int8Linear.of(Linear(torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype) if bias else None))


def inputs(rows: int, width: int, dtype: torch.dtype, large: int = 0) -> Tensor:
    """With `large` values that count as outliers."""
    torch.manual_seed(rows * width + large)
    x = torch.randn(rows, width).clamp(-OUTLIER / 2, OUTLIER / 2)
    x.view(-1)[torch.randperm(x.numel())[:large]] *= 30
    return x.to(dtype)


def expected(weight: Int8Linear, x: Tensor) -> Tensor:
    x = x.float()
    outlier = ~(x.abs() < OUTLIER)
    kept = x.masked_fill(outlier, 0).half().float()
    most = kept.abs().amax(1, keepdim=True)
    codes = (kept * torch.where(most > 0, torch.full_like(most, 127) / most, 0)).round().double()
    rounded = codes * most.double() / 127 + x.where(outlier, 0)
    product = rounded @ (weight.codes.double() * weight.scales.double()[:, None] / 127).T
    return product if weight.bias is None else product + weight.bias.double()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), outputs=st.integers(1, 90), width=st.integers(1, 200), large=st.integers(0, 20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), bias=st.booleans(),
)  # fmt: skip
def test_equals_rounding_and_multiplying_in_turn(rows, outputs, width, large, dtype, bias):
    weight, x = matrix(outputs, width, dtype, bias), inputs(rows, width, dtype, large)
    wanted = expected(weight, x)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(weight(x).double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_bit_for_bit_beside_any_others(dtype):
    weight, x = matrix(75, 130, dtype), inputs(3 * MANY, 130, dtype, large=25)
    together = weight(x)
    for count in (1, 2, 3, 4, 7, MANY, MANY + 5):
        assert torch.equal(weight(x[:count]), together[:count])
        assert torch.equal(weight(x[-count:]), together[-count:])


@pytest.mark.parametrize("rows", [2, 2 * MANY])
def test_what_is_no_number_stays_in_its_row(rows):
    weight, x = matrix(40, 64, torch.float32), inputs(rows, 64, torch.float32)
    before = weight(x)
    x[1, 3] = torch.nan
    assert weight(x)[1].isnan().all()
    assert torch.equal(weight(x)[0], before[0])


def test_more_rows_than_run_together_in_wide_matrices():
    width = 20_000
    weight, x = matrix(33, width, torch.float32), inputs(130, width, torch.float32, large=50)
    torch.testing.assert_close(weight(x).double(), expected(weight, x), rtol=1e-5, atol=1e-4)
