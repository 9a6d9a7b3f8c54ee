"""Every way to compute attention against torch's own, with grouped heads, a bias on keys, and a few query rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from models import attention, kernels
from models.attention import _sdpa, attend, attend_packed, packs, widen_heads


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


native = pytest.mark.skipif(kernels.attention_library() is None, reason="needs AVX-512")


@native
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 60), before=st.integers(0, 70), group=st.sampled_from([1, 3]), dim=st.sampled_from([8, 20, 64, 72, 130]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), biased=st.booleans(), causal=st.booleans(),
)  # fmt: skip
def test_native_attention_matches_torch(rows, before, group, dim, dtype, biased, causal):
    torch.manual_seed(rows)
    query = torch.randn(rows, 2 * group, dim).to(dtype)
    keys, values = (torch.randn(2, rows + before + 5, dim).to(dtype)[:, : rows + before] for _ in range(2))  # as in a cache
    bias = torch.rand(rows + before).to(dtype) if biased else None
    found = kernels.attend_rows(kernels.attention_library(), query, keys, values, bias, 0.3, causal=causal)
    wide = None if bias is None else bias.float()
    wanted = _sdpa(query.float(), keys.float(), values.float(), wide, 0.3, causal=causal)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)


@native
def test_natively_a_row_does_not_depend_on_those_beside_it():
    torch.manual_seed(0)
    query, keys, values = torch.randn(50, 6, 64), torch.randn(2, 90, 64), torch.randn(2, 90, 64)
    run = partial(kernels.attend_rows, kernels.attention_library(), keys=keys, values=values, bias=None, scale=0.1, causal=True)
    for count in (1, 5, 6, 7, 12, 49):
        assert torch.equal(run(query=query[-count:]), run(query=query)[-count:])


@native
def test_natively_more_heads_than_are_packed_at_a_time():
    """Three heads of 64 dimensions and 20,000 keys are 31 MB."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(3, 6, 64), torch.randn(3, 20_000, 64), torch.randn(3, 20_000, 64)
    found = kernels.attend_rows(kernels.attention_library(), query, keys, values, None, 0.1, causal=True)
    torch.testing.assert_close(found, _sdpa(query, keys, values, None, 0.1, causal=True), rtol=1e-4, atol=1e-5)


@native
def test_natively_what_is_no_number_stays_in_its_row():
    query = torch.randn(9, 2, 16)
    query[3, 1] = torch.nan
    keys, values = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    found = kernels.attend_rows(kernels.attention_library(), query, keys, values, None, 1.0, causal=False)
    assert found.isnan().any(2).nonzero().tolist() == [[3, 1]]


def flash(query, keys, values, starts, key_starts, rows, length, *, scale, window_size, enable_gqa):
    """What `torch.nn.attention.varlen.varlen_attn` is told to compute, of which torch has no kernel on a CPU."""
    assert window_size == (-1, 0) and enable_gqa and starts.dtype == key_starts.dtype == torch.int32
    assert query.shape[2] == keys.shape[2] == values.shape[2] and query.shape[2] % 8 == 0
    counts, lengths = starts.diff().tolist(), key_starts.diff().tolist()
    assert (max(counts), max(lengths)) == (rows, length)
    parts = zip(query.split(counts), keys.split(lengths), values.split(lengths), strict=True)
    return torch.cat([
        _sdpa(q, k.transpose(0, 1), v.transpose(0, 1), None, scale, causal=True) if len(q) else q for q, k, v in parts
    ])  # fmt: skip


@settings(max_examples=40)
@given(
    dim=st.sampled_from([8, 12, 64, 80, 128]), group=st.integers(1, 3), rows=st.integers(1, 40), seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 600), min_size=2, max_size=40),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)  # fmt: skip
def test_a_bias_as_head_dimensions_equals_one_added(dim, group, sizes, rows, dtype, seed):
    """Products and sums are in float32, as in flash kernels; what is rounded are queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(min(rows, len(sizes)), 2 * group, dim, generator=generator).to(dtype)
    keys, values = torch.randn(2, len(sizes), 2, dim, generator=generator).to(dtype)
    bias, scale = torch.tensor(sizes, dtype=torch.float32).log(), dim**-0.5
    widened = widen_heads(query, keys, values, bias, scale)
    assert all(part.dtype == dtype and part.shape[2] % 8 == 0 for part in widened)
    q, k, v = (part.float() for part in widened)
    found = _sdpa(q, k.transpose(0, 1), v.transpose(0, 1), None, scale, causal=True)[..., :dim]
    q, k, v = (part.float() for part in (query, keys, values))
    wanted = _sdpa(q, k.transpose(0, 1), v.transpose(0, 1), bias, scale, causal=True)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    scores = scale * (widened[0].float()[0, 0, dim:] @ widened[1].float()[:, 0, dim:].T)
    torch.testing.assert_close(scores, bias, rtol=1e-6, atol=1e-6)


def packed_and_alone(dim: int, biased: bool, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    counts, lengths, generator = [5, 0, 1, 9], [5, 4, 7, 30], torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    query, keys, values = draw(sum(counts), 4, dim), draw(sum(lengths), 2, dim), draw(sum(lengths), 2, dim)
    bias = draw(sum(lengths)).abs() if biased else None
    own = [None] * len(lengths) if bias is None else bias.split(lengths)
    alone = [
        attend(q, k.transpose(0, 1), v.transpose(0, 1), scale=0.3, bias=b)
        for q, k, v, b in zip(query.split(counts), keys.split(lengths), values.split(lengths), own, strict=True) if len(q)
    ]  # fmt: skip
    return attend_packed(query, keys, values, counts, lengths, scale=0.3, bias=bias), torch.cat(alone)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dim", [8, 12])
def test_packed_sequences_attend_as_each_alone(dim, biased, monkeypatch):
    monkeypatch.setattr(attention, "flash_attention", lambda: partial(flash, enable_gqa=True))
    torch.testing.assert_close(*packed_and_alone(dim, biased, "cpu", torch.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dim", [64, 100, 128])
def test_a_flash_kernel_attends_as_each_sequence_alone(dim, biased):
    if not packs(torch.empty(1, 4, dim, device="cuda", dtype=torch.bfloat16), 2):
        pytest.skip("this torch or this card has no such kernel")
    torch.testing.assert_close(*packed_and_alone(dim, biased, "cuda", torch.bfloat16), rtol=0.02, atol=0.02)
