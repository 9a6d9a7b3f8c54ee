"""Every form of a weight against torch in float32, with the native kernels where they run and without them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import kernels
from models.linear import Linear, SparseLinear

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 150), st.integers(1, 40))  # rows, in, out


def problem(shape: tuple[int, int, int], kept: float, seed: int) -> tuple[torch.Tensor, Linear]:
    rows, inputs, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator)
    weight *= torch.rand(outputs, inputs, generator=generator) < kept
    bias = torch.randn(outputs, generator=generator).bfloat16() if seed % 2 else None
    return torch.randn(rows, inputs, generator=generator).bfloat16(), Linear(weight.bfloat16(), bias)


def reference(x: torch.Tensor, linear: Linear) -> torch.Tensor:
    bias = None if linear.bias is None else linear.bias.float()
    return torch.nn.functional.linear(x.float(), linear.weight.float(), bias)


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(kernels, "library", lambda: None)
    return request.param


@pytest.mark.parametrize("form", [lambda linear: linear, SparseLinear.of], ids=["dense", "sparse"])
def test_each_form_equals_float32(path, form):
    @settings(max_examples=60)
    @given(SHAPES, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(0, 99))
    def check(shape, kept, seed):
        x, linear = problem(shape, kept, seed)
        torch.testing.assert_close(form(linear)(x).float(), reference(x, linear), rtol=0.02, atol=0.02 * shape[1] ** 0.5)

    check()


def test_a_sparse_weight_comes_back_as_it_was(path):
    _, linear = problem((1, 133, 37), 0.5, 1)
    assert torch.equal(SparseLinear.of(linear).dense(), linear.weight)


def test_half_the_weights_take_little_more_than_half_the_bytes():
    _, linear = problem((1, 1024, 512), 0.5, 0)
    assert SparseLinear.of(linear).bytes <= 0.60 * linear.bytes


def test_not_a_number_is_not_hidden(path):
    x, linear = problem((2, 64, 8), 1.0, 0)
    x[1, 3] = torch.nan
    out = linear(x)
    assert torch.isfinite(out[0]).all()
    assert out[1].isnan().all()


def test_only_bfloat16_is_held_sparse():
    with pytest.raises(ValueError, match="only bfloat16"):
        SparseLinear.of(Linear(torch.zeros(4, 4)))
