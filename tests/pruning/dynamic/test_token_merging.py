"""Merging visual tokens: how many stay, which, and what they hold."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruning.dynamic.token_merging import euclidean, farthest_first, merge_tokens

totals = st.one_of(st.integers(1, 14).map(lambda side: side * side), st.integers(1, 200))


def features(total: int, seed: int = 0, width: int = 6) -> Tensor:
    return torch.randn(total, width, generator=torch.Generator().manual_seed(seed))


@given(total=totals, data=st.data())
def test_it_keeps_what_it_is_told_and_the_sum_of_all_tokens(total, data):
    """Each kept token is the mean of those it stands for, so that sizes times tokens add up to the picture."""
    keep = data.draw(st.integers(1, total + 5))
    tokens = features(total, 5)
    before = tokens.clone()
    chosen = merge_tokens(tokens, keep)
    kept = chosen.indices.tolist()
    assert kept == sorted(set(kept))
    assert 0 <= kept[0] <= kept[-1] < total
    assert len(kept) == min(keep, total)
    assert torch.equal(tokens, before), "features are remembered for the next request and must not change"
    sizes = torch.tensor(chosen.sizes or (1,) * total)
    assert int(sizes.sum()) == total
    assert int(sizes.min()) >= 1
    torch.testing.assert_close((sizes[:, None] * chosen.tokens[chosen.indices]).sum(0), tokens.sum(0), rtol=1e-3, atol=1e-4)


@given(total=totals, extra=st.integers(0, 3))
def test_keeping_all_is_the_identity(total, extra):
    tokens = features(total)
    chosen = merge_tokens(tokens, total + extra)
    assert chosen.indices.tolist() == list(range(total))
    assert chosen.tokens is tokens
    assert not chosen.sizes


def test_identical_tokens_are_still_chosen_once():
    kept = merge_tokens(torch.ones(36, 4), 20).indices.tolist()
    assert len(set(kept)) == 20


def test_copies_of_a_token_merge_into_it_unchanged():
    picture = features(8).repeat(3, 1)
    chosen = merge_tokens(picture, 8)
    assert chosen.sizes == (3,) * 8
    torch.testing.assert_close(chosen.tokens[chosen.indices], picture[chosen.indices])


def test_farthest_first_is_the_greedy_max_min_distance():
    distance = euclidean(features(30))
    chosen = [int(distance.sum(0).argmax())]
    while len(chosen) < 7:
        rest = [i for i in range(30) if i not in chosen]
        chosen.append(max(rest, key=lambda i: float(distance[i, chosen].min())))
    assert farthest_first(distance, 7).tolist() == sorted(chosen)


def test_weights_choose_sooner_what_matters():
    distance = euclidean(features(36))
    plain = farthest_first(distance, 3).tolist()
    left_out = next(i for i in range(36) if i not in plain)
    weights = torch.zeros(36)
    assert farthest_first(distance, 3, weights).tolist() == plain
    weights[left_out] = 20.0
    assert left_out in farthest_first(distance, 3, weights).tolist()
