"""The KV cache: for each request exactly the rows and layers that its route keeps; and beginnings that further prompts share."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


class RequestCache:
    """One request's keys and values in one allocation: a slab [2, kv_heads, rows, head_dim] for each layer that runs.

    `rows` and `kv_heads` are given by layer. Allocated once, at admission. `slab_pointers` and `slab_rows` say by layer where its
    slab lies, null where it does not run, and for how many rows, for `models.decode`.
    """

    def __init__(
        self, rows: Sequence[int], kv_heads: Sequence[int], head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = tuple(rows)
        self.lengths = [0] * len(rows)
        sizes = [2 * heads * head_dim * n for heads, n in zip(kv_heads, rows, strict=True)]
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        self._slabs = [
            part.view(2, heads, n, head_dim) if n else None
            for part, heads, n in zip(flat.split(sizes), kv_heads, rows, strict=True)
        ]
        self.nbytes = flat.numel() * flat.element_size()
        self._bias: Tensor | None = None
        self.slab_pointers = (ctypes.c_void_p * len(rows))(*(slab.data_ptr() if slab is not None else None for slab in self._slabs))
        self.slab_rows = (ctypes.c_int64 * len(rows))(*rows)

    def keys(self, layer: int) -> Tensor:
        """A layer's keys so far: [kv_heads, length, head_dim]; a layer that does not run has none."""
        slab = self._slabs[layer]
        if slab is None:
            raise ValueError(f"layer {layer} does not run for this request")
        return slab[0, :, : self.lengths[layer]]

    def beginning(self, rows: int) -> list[Tensor | None]:
        """A copy of the first `rows` keys and values of each layer that runs: [2, kv_heads, rows, head_dim]."""
        return [None if slab is None else slab[:, :, :rows].clone() for slab in self._slabs]

    def begin_with(self, beginning: Sequence[Tensor | None]) -> None:
        """Take over what `beginning` gave of a request with the same route."""
        for layer, (slab, part) in enumerate(zip(self._slabs, beginning, strict=True)):
            if slab is not None and part is not None:
                self.lengths[layer] = part.shape[2]
                slab[:, :, : part.shape[2]] = part

    def set_bias(self, bias: Tensor) -> None:
        """Add `bias` [n] to the attention scores of the first n rows, in every layer."""
        self._bias = bias.new_zeros(max(self.capacity))
        self._bias[: len(bias)] = bias

    def bias(self, layer: int) -> Tensor | None:
        """What is added to the attention scores of a layer's rows: [length], or None."""
        return None if self._bias is None else self._bias[: self.lengths[layer]]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows [n, kv_heads, head_dim] to a layer; return all its keys and values as [kv_heads, length, head_dim] views."""
        slab = self._slabs[layer]
        start, stop = self.lengths[layer], self.lengths[layer] + len(keys)
        if slab is None or stop > self.capacity[layer]:
            raise _no_room(layer, self.capacity[layer], stop)
        slab[0, :, start:stop] = keys.transpose(0, 1)
        slab[1, :, start:stop] = values.transpose(0, 1)
        self.lengths[layer] = stop
        return slab[0, :, :stop], slab[1, :, :stop]

    def append_rows(self, rows: int) -> ctypes.Array[ctypes.c_int64]:
        """Count `rows` more in each layer that runs, which the caller writes; returns the rows before them, by layer."""
        before = (ctypes.c_int64 * len(self.lengths))(*self.lengths)
        for layer, (length, capacity) in enumerate(zip(self.lengths, self.capacity, strict=True)):
            if length + rows > capacity > 0:
                raise _no_room(layer, capacity, length + rows)
        self.lengths[:] = [length + rows * (capacity > 0) for length, capacity in zip(self.lengths, self.capacity, strict=True)]
        return before

    def append_row(self, layer: int) -> tuple[int, int, int, int]:
        """Count one more row in a layer, which the caller writes at its `place`, which is returned."""
        if self.lengths[layer] == self.capacity[layer]:
            raise _no_room(layer, self.capacity[layer], self.lengths[layer] + 1)
        place = self.place(layer)
        self.lengths[layer] += 1
        return place

    def place(self, layer: int) -> tuple[int, int, int, int]:
        """Where a layer's slab lies, its rows, how many are written, and where the bias lies or 0, as kernels on a GPU read it."""
        return self.slab_pointers[layer] or 0, self.capacity[layer], self.lengths[layer], self.bias_pointer or 0

    @property
    def bias_pointer(self) -> int | None:
        """Where the bias of all rows lies."""
        return None if self._bias is None else self._bias.data_ptr()


def _no_room(layer: int, capacity: int, rows: int) -> RuntimeError:
    return RuntimeError(f"layer {layer} has room for {capacity} rows, not {rows}")


class KVCache:
    """All requests' caches under one budget of rows, each one token in one layer.

    A request's rows are taken whole when it is admitted and given back whole, so memory is never over-committed.
    """

    def __init__(self, budget: int, new_cache: Callable[[Sequence[int]], RequestCache]) -> None:
        self.budget = budget
        self.used = 0
        self._new_cache = new_cache
        self._live: dict[str, RequestCache] = {}

    def allocate(self, request_id: str, rows: Sequence[int]) -> RequestCache:
        if request_id in self._live:
            raise ValueError(f"request {request_id} already holds a cache")
        if self.used + sum(rows) > self.budget:
            raise MemoryError(f"{sum(rows)} rows asked for, {self.budget - self.used} of {self.budget} are free")
        cache = self._live[request_id] = self._new_cache(rows)
        self.used += sum(rows)
        return cache

    def free(self, request_id: str) -> None:
        cache = self._live.pop(request_id, None)
        if cache is not None:
            self.used -= sum(cache.capacity)

    def check_integrity(self) -> None:
        """Raise AssertionError unless live requests hold exactly what is counted, within the budget."""
        held = sum(sum(cache.capacity) for cache in self._live.values())
        assert held == self.used <= self.budget, f"{held} rows held, {self.used} counted, budget {self.budget}"
        for cache in self._live.values():
            assert all(n <= c for n, c in zip(cache.lengths, cache.capacity, strict=True))


@dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt, up to its last visual token: its rows, its visual tokens that run, and the keys and values of each
    layer that runs."""

    rows: int
    visual: Tensor
    layers: list[Tensor | None]

    @property
    def size(self) -> int:
        """Rows times layers, as the budget counts."""
        return self.rows * sum(part is not None for part in self.layers)


class PrefixCache:
    """Beginnings of prompts, the most recently used ones first, within a budget of rows, each one token in one layer.

    A key says which tokens and which route; the visual tokens themselves are compared, since a router may change what they hold.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.used = 0
        self._kept: OrderedDict[Hashable, Prefix] = OrderedDict()

    def find(self, key: Hashable, visual: Tensor) -> Prefix | None:
        prefix = self._kept.get(key)
        if prefix is None or not torch.equal(prefix.visual, visual):
            return None
        self._kept.move_to_end(key)
        return prefix

    def keep(self, key: Hashable, prefix: Prefix) -> None:
        """Remember it in the place of whatever has its key; the least recently used ones make room. One too large is not kept."""
        if prefix.size > self.budget:
            return
        if (old := self._kept.pop(key, None)) is not None:
            self.used -= old.size
        self._kept[key] = prefix
        self.used += prefix.size
        while self.used > self.budget:
            self.used -= self._kept.popitem(last=False)[1].size
