"""Every way to compute attention against torch's own, with grouped heads, a bias on keys, and a few query rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

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
