"""The budget of the KV cache."""

from __future__ import annotations

import pytest

from models.kv_cache import KVCache
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
