"""The budgets of the KV cache and of beginnings that prompts share."""

from __future__ import annotations

import pytest
import torch

from models.kv_cache import KVCache, Prefix, PrefixCache
from tests.models.tiny_llava import pair


def test_kv_budget_is_never_over_committed_and_all_comes_back():
    _, model = pair()
    cache = KVCache(100, model.new_cache)
    cache.allocate("a", [30, 0, 30])
    with pytest.raises(MemoryError, match="40 of 100 are free"):
        cache.allocate("b", [41, 0, 0])
    with pytest.raises(ValueError, match="already holds"):
        cache.allocate("a", [1, 0, 0])
    cache.allocate("b", [0, 40, 0])
    cache.check_integrity()
    cache.free("a")
    cache.free("a")
    cache.free("b")
    cache.check_integrity()
    assert cache.used == 0


def prefix(rows: int, seed: int = 0) -> Prefix:
    return Prefix(rows, torch.full((2, 4), float(seed)), [torch.zeros(2, 1, rows, 4), None])


def test_the_least_recently_used_beginning_makes_room() -> None:
    cache = PrefixCache(10)
    for name in "abc":
        cache.keep(name, prefix(4))
        cache.find("a", prefix(4).visual)
    assert [cache.find(name, prefix(4).visual) is not None for name in "abc"] == [True, False, True]
    assert cache.used == 8
    cache.keep("a", prefix(5))
    assert cache.used == 9
    cache.keep("large", prefix(11))
    assert cache.find("large", prefix(11).visual) is None


def test_a_beginning_with_other_visual_tokens_is_not_found() -> None:
    cache = PrefixCache(10)
    cache.keep("a", prefix(4, seed=1))
    assert cache.find("a", prefix(4, seed=2).visual) is None
