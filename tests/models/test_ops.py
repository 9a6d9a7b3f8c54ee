"""Elementwise operations: our kernels, and torch in their place, against torch in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from models import kernels
from models.ops import apply_rope, quick_gelu, rms_norm, swiglu

ONE_ROUNDING = {"rtol": 2**-8, "atol": 1e-6}
SEVERAL = {"rtol": 2**-6, "atol": 1e-2}


@pytest.fixture(params=["kernels", "torch"])
def tolerance(request, monkeypatch):
    if request.param == "kernels" and kernels.library() is None:
        pytest.skip("needs the native kernels")
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return ONE_ROUNDING if request.param == "kernels" else SEVERAL


def draw(*shape: int) -> torch.Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).bfloat16()


@pytest.mark.parametrize("width", [16, 24, 1000, 2048])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_norm_swiglu_and_gelu_equal_float32(rows, width, tolerance):
    x, weight, pair = draw(rows, width), draw(width), draw(rows, 2 * width)
    wanted = F.rms_norm(x.float(), (width,), weight.float(), 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).float(), wanted, **tolerance)
    gate, up = pair.float().chunk(2, -1)
    torch.testing.assert_close(swiglu(pair).float(), F.silu(gate) * up, **tolerance)
    torch.testing.assert_close(quick_gelu(x).float(), x.float() * torch.sigmoid(1.702 * x.float()), **tolerance)


@pytest.mark.parametrize("dim", [8, 64, 72])
def test_rope_of_heads_that_lie_among_others(dim, tolerance):
    rows, heads = 70, 3
    x, angles = draw(rows, heads + 2, dim)[:, 1:-1], draw(rows, 1, dim // 2).float()
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    first, second = x.float().chunk(2, -1)
    wanted = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    found = apply_rope(x, cos, sin)
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance["rtol"], atol=0.05 if tolerance is SEVERAL else 1e-5)


@pytest.mark.skipif(kernels.library() is None, reason="needs the native kernels")
@given(st.floats(width=16, allow_nan=False, allow_infinity=False))
def test_swiglu_is_right_far_from_zero(value):
    x = torch.full((1, 17), value).bfloat16()
    torch.testing.assert_close(swiglu(torch.cat([x, torch.ones_like(x)], 1)).float(), F.silu(x.float()), rtol=2**-8, atol=1e-30)


def test_nan_is_not_hidden(tolerance):
    x = draw(2, 64)
    x[1, 40] = torch.nan
    assert rms_norm(x, torch.ones(64).bfloat16(), 1e-5)[1].isnan().all()
    assert swiglu(x)[1, 8].isnan()
    assert quick_gelu(x)[1, 40].isnan()
    assert not swiglu(x)[0].isnan().any()


def test_gradients_run_through_torch():
    x = torch.ones(1, 8, dtype=torch.bfloat16, requires_grad=True)
    swiglu(x).sum().backward()
    assert x.grad is not None
