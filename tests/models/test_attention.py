"""Every way to compute attention against torch's own, with grouped heads, a bias on keys, and a few query rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models import kernels
from models.attention import _sdpa, attend


def parts(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return (
        torch.randn(rows, 4, 8, generator=generator),
        torch.randn(2, length, 8, generator=generator),
        torch.randn(2, length, 8, generator=generator),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("length", "rows"), [(300, None), (300, [299]), (300, range(150, 300)), (40, [0, 3, 39]), (40, [7])])
def test_attention_matches_torch(length, rows, biased, causal):
    positions = torch.arange(length) if rows is None else torch.tensor(list(rows))
    query, keys, values = parts(len(positions), length)
    bias = torch.linspace(0, 3, length) if biased else None
    mask = torch.zeros(len(positions), length) if bias is None else bias.repeat(len(positions), 1)
    if causal:
        mask = mask.masked_fill(torch.arange(length) > positions[:, None], -torch.inf)
    wanted = F.scaled_dot_product_attention(query.transpose(0, 1), keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0),
                                            mask, scale=0.3).transpose(0, 1)  # fmt: skip
    found = attend(query, keys, values, scale=0.3, causal=causal, query_positions=None if rows is None else positions, bias=bias)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if len(positions) > 1 and positions[-1] - positions[0] == len(positions) - 1:  # the last rows
        found = attend(query, keys, values, scale=0.3, causal=causal, bias=bias)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        # What a GPU runs, and a CPU with AMX.
        torch.testing.assert_close(_sdpa(query, keys, values, bias, 0.3, causal=causal), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(kernels.library() is None, reason="needs the native kernels")
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 2, 64), (4, 4, 128), (6, 2, 32), (16, 2, 96), (4, 2, 160)])
def test_decode_attention_equals_each_request_alone(heads, kv_heads, dim):
    generator = torch.Generator().manual_seed(dim)
    lengths = (1, 15, 16, 200)
    rows = torch.randn(len(lengths), heads + 3, dim, generator=generator).bfloat16()
    slabs = [torch.randn(2, kv_heads, n + 5, dim, generator=generator).bfloat16() for n in lengths]
    kv = [(slab[0, :, :n], slab[1, :, :n]) for slab, n in zip(slabs, lengths, strict=True)]
    biases = [torch.linspace(0, 3, n).bfloat16() if n > 15 else None for n in lengths]
    query = rows[:, :heads]
    found = kernels.decode_attention(kernels.library(), query, kv, biases, 0.2)
    for own, (keys, values), bias, out in zip(query, kv, biases, found, strict=True):
        alone = attend(own[None].float(), keys.float(), values.float(), scale=0.2, bias=None if bias is None else bias.float())
        torch.testing.assert_close(out[None].float(), alone, rtol=0.01, atol=0.01)


@pytest.mark.skipif(kernels.library() is None, reason="needs the native kernels")
def test_decode_attention_does_not_hide_nan():
    query, keys = torch.ones(1, 2, 32).bfloat16(), torch.ones(1, 20, 32).bfloat16()
    keys[0, 3, 5] = torch.nan
    assert kernels.decode_attention(kernels.library(), query, [(keys, torch.ones_like(keys))], [None], 1.0).isnan().all()
