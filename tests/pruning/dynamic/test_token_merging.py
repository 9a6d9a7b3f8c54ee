"""The training-free choices of visual tokens: how many stay, which, and what they hold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruning.dynamic.token_merging import TOKEN_POLICIES, cosine, farthest_first, keep_tokens

policies = st.sampled_from([policy for policy in TOKEN_POLICIES if policy != "router"])
totals = st.one_of(st.integers(1, 14).map(lambda side: side * side), st.integers(1, 200))


def features(total: int, seed: int = 0, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(total, width, generator=generator), torch.rand(total, generator=generator).softmax(-1)


def grid(side: int) -> Tensor:
    """Tokens that hold their own column and row."""
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([xs.flatten(), ys.flatten()], dim=-1).float()


@given(policy=policies, total=totals, data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_every_policy_keeps_what_it_is_told_in_order_and_once(policy, total, data, seed):
    keep = data.draw(st.integers(1, total + 5))
    tokens, attention = features(total, seed % 7)
    before = tokens.clone()
    chosen = keep_tokens(policy, tokens, attention, keep, seed)
    indices, used = chosen.indices, chosen.tokens
    kept = indices.tolist()
    assert indices.dtype == torch.long
    assert kept == sorted(set(kept))
    assert 0 <= kept[0] <= kept[-1] < total
    if policy == "pooling":
        assert 1 <= len(kept) <= keep
    else:
        assert len(kept) == min(keep, total)
        assert used is tokens or policy in ("merging", "router")
    assert used.shape == tokens.shape
    assert torch.equal(tokens, before), "features are remembered for the next request and must not change"


@given(policy=policies, total=totals, extra=st.integers(0, 3))
def test_keeping_all_is_the_identity(policy, total, extra):
    tokens, attention = features(total)
    chosen = keep_tokens(policy, tokens, attention, total + extra, seed=1)
    assert chosen.indices.tolist() == list(range(total))
    assert chosen.tokens is tokens
    assert not chosen.sizes


@given(policy=policies, total=totals, data=st.data())
def test_the_same_picture_keeps_the_same_tokens(policy, total, data):
    keep = data.draw(st.integers(1, total))
    first, second = (keep_tokens(policy, *features(total, 3), keep, seed=11).indices.tolist() for _ in range(2))
    assert first == second


@pytest.mark.parametrize("policy", ["merging", "divprune", "cls_diversity", "random", "uniform"])
def test_identical_tokens_are_still_chosen_once(policy):
    tokens, attention = torch.ones(36, 4), torch.full((36,), 1 / 36)
    kept = keep_tokens(policy, tokens, attention, 20, seed=0).indices.tolist()
    assert len(set(kept)) == 20


def test_random_follows_its_seed():
    tokens, attention = features(144)
    first, other = (keep_tokens("random", tokens, attention, 24, seed).indices.tolist() for seed in (1, 2))
    assert first != other


def test_cls_diversity_keeps_what_the_class_token_looks_at():
    tokens, attention = features(144)
    kept = set(keep_tokens("cls_diversity", tokens, attention, 24, seed=0).indices.tolist())
    assert kept >= set(attention.topk(12).indices.tolist())
    assert set(keep_tokens("cls_diversity", tokens, attention, 1, seed=0).indices.tolist()) == {int(attention.argmax())}


def test_cls_diversity_finds_the_odd_one_that_nobody_looks_at():
    tokens = F.one_hot(torch.zeros(100, dtype=torch.long), 4).float()
    tokens[17] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    tokens[63] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    attention = torch.linspace(1, 0, 100)
    attention[[17, 63]] = 0.0
    kept = keep_tokens("cls_diversity", tokens, attention, 6, seed=0).indices.tolist()
    assert {17, 63} <= set(kept)


@pytest.mark.parametrize("keep", [4, 9, 16, 24, 48, 96])
def test_uniform_covers_the_picture(keep):
    side = 12
    tokens, attention = grid(side), torch.ones(side * side)
    kept = tokens[keep_tokens("uniform", tokens, attention, keep, seed=0).indices]
    corners = torch.tensor([[0.0, 0.0], [side - 1, 0], [0, side - 1], [side - 1, side - 1]])
    reach = side / keep**0.5  # no corner is further from a kept token than the spacing allows
    assert torch.cdist(corners, kept).min(dim=1).values.max() <= reach
    assert torch.allclose(kept.mean(0), torch.full((2,), (side - 1) / 2), atol=1.0)


@given(side=st.integers(1, 14), data=st.data())
def test_pooling_makes_means_of_square_cells(side, data):
    keep = data.draw(st.integers(1, side * side))
    tokens, attention = features(side * side)
    chosen = keep_tokens("pooling", tokens, attention, keep, seed=0)
    indices, used = chosen.indices, chosen.tokens
    if keep == side * side:
        return
    cells = round(len(indices) ** 0.5)
    assert cells * cells == len(indices)
    size = next(c for c in range(1, side + 1) if -(-side // c) == cells and (-(-side // c)) ** 2 <= keep)
    square = tokens.view(side, side, -1)
    for number, index in enumerate(indices.tolist()):
        top, left = number // cells * size, number % cells * size
        cell = square[top : top + size, left : left + size]
        torch.testing.assert_close(used[index], cell.mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)
        assert top <= index // side < top + size, "a mean stands inside its own cell, where its position is right"
        assert left <= index % side < left + size


def test_pooling_keeps_the_dtype_of_the_features():
    tokens, attention = features(144)
    assert keep_tokens("pooling", tokens.bfloat16(), attention, 24, seed=0).tokens.dtype == torch.bfloat16


def test_divprune_is_the_greedy_max_min_distance():
    tokens, attention = features(30)
    kept = set(keep_tokens("divprune", tokens, attention, 7, seed=0).indices.tolist())
    distance = 1 - F.cosine_similarity(tokens[:, None], tokens[None], dim=-1)
    chosen = [int(distance.sum(0).argmax())]
    while len(chosen) < 7:
        rest = [i for i in range(30) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(distance[i, chosen].min())))
    assert kept == set(chosen)


def test_weights_choose_sooner_what_matters():
    distance = cosine(features(36)[0])
    plain = farthest_first(distance, 3).tolist()
    left_out = next(i for i in range(36) if i not in plain)
    weights = torch.zeros(36)
    assert farthest_first(distance, 3, weights).tolist() == plain
    weights[left_out] = 20.0
    assert left_out in farthest_first(distance, 3, weights).tolist()


@given(total=totals, data=st.data())
def test_merging_keeps_the_sum_of_all_tokens(total, data):
    """Each kept token is the mean of those it stands for, so that sizes times tokens add up to the picture."""
    keep = data.draw(st.integers(1, max(1, total - 1)))
    tokens, attention = features(total, 5)
    chosen = keep_tokens("merging", tokens, attention, keep, seed=0)
    sizes = torch.tensor(chosen.sizes or (1,) * total)
    assert int(sizes.sum()) == total and int(sizes.min()) >= 1
    torch.testing.assert_close((sizes[:, None] * chosen.tokens[chosen.indices]).sum(0), tokens.sum(0), rtol=1e-3, atol=1e-4)


def test_copies_of_a_token_merge_into_it_unchanged():
    tokens, attention = features(8)
    picture = tokens.repeat(3, 1)
    chosen = keep_tokens("merging", picture, attention.repeat(3), 8, seed=0)
    assert chosen.sizes == (3,) * 8
    torch.testing.assert_close(chosen.tokens[chosen.indices], picture[chosen.indices])
