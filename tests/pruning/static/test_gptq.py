"""Rounding with error feedback: never worse than to nearest, on a grid that bitsandbytes finds again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.quantized import BLOCK, bitsandbytes, dequantize_4bit, nf4_values
from pruning.static import gptq, obs
from tests.pruning.static.test_criteria import hessian_of, loss, rows_of

pytest.importorskip("bitsandbytes")

SHAPES = st.sampled_from([(64, 24), (16, 64), (24, 80), (8, 192)])
"""Blocks that fill rows, lie within one, and reach from one into the next."""


def weight_of(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest(weight: Tensor) -> Tensor:
    codes, state = bitsandbytes().functional.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    return dequantize_4bit(codes, state, weight.dtype)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_outputs_are_closer_than_with_nearest(shape, seed):
    weight, rows = weight_of(shape, seed), rows_of(shape[1], seed, 4 * shape[1])
    rounded = gptq.round_nf4(weight, gptq.prepare(hessian_of(rows)))
    assert loss(weight, rounded, rows) < 0.9 * loss(weight, nearest(weight), rows)


@settings(deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_inputs_that_do_not_correlate_leave_nothing_to_make_up(shape, seed):
    diagonal = torch.rand(shape[1], generator=torch.Generator().manual_seed(seed)) + 0.1
    weight = weight_of(shape, seed)
    assert torch.equal(gptq.round_nf4(weight, gptq.prepare(obs.Hessian(diagonal.diag(), 1))), nearest(weight))


@pytest.mark.parametrize("block_size", [1, 7, 500])
def test_the_block_size_changes_speed_alone(block_size):
    weight, factor = weight_of((16, 64), 0), gptq.prepare(hessian_of(rows_of(64, 0, 256)))
    torch.testing.assert_close(gptq.round_nf4(weight, factor, block_size), gptq.round_nf4(weight, factor))


@settings(deadline=None)
@given(SHAPES, st.integers(0, 99), st.sampled_from([torch.float32, torch.bfloat16]))
def test_zeros_stay_and_rounding_again_changes_nothing(shape, seed, dtype):
    weight = weight_of(shape, seed)
    weight[weight_of(shape, seed + 1) < 0] = 0
    weight[3] = 0
    weight = weight.to(dtype)
    rounded = gptq.round_nf4(weight, gptq.prepare(hessian_of(rows_of(shape[1], seed, 256))))
    assert rounded.dtype == dtype
    assert not rounded[weight == 0].any()
    assert torch.equal(nearest(rounded), rounded)
    blocks, before = rounded.float().view(-1, BLOCK), weight.float().view(-1, BLOCK)
    assert torch.equal(blocks.abs().amax(1), before.abs().amax(1)), "scales are those of the weights"
    if dtype == torch.float32:
        codes = blocks / before.abs().amax(1, keepdim=True).clamp(min=1e-30)
        assert (codes[..., None] - nf4_values("cpu")).abs().amin(-1).max() < 1e-6


def test_inputs_that_are_always_zero_are_rounded_to_nearest():
    weight, rows = weight_of((16, 64), 0), rows_of(64, 0, 256)
    rows[:, 10:20] = 0
    rounded = gptq.round_nf4(weight, gptq.prepare(hessian_of(rows)))
    assert torch.equal(rounded[:, 10:20], nearest(weight)[:, 10:20])


def test_blocks_that_do_not_fill_the_matrix_are_refused():
    with pytest.raises(ValueError, match="3 x 24 weights do not divide into NF4's blocks of 64"):
        gptq.round_nf4(torch.ones(3, 24), gptq.prepare(hessian_of(rows_of(24, 0))))
