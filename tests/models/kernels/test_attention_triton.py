"""Attention of all requests of a step in one call against `attend`, one by one: on a card, or in Triton's interpreter on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.attention import attend
from models.kv_cache import RequestCache

attention_triton = pytest.importorskip("models.kernels.attention_triton", exc_type=ImportError)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
# Triton 3.9's interpreter multiplies the bits of bfloat16 as whole numbers.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01} | ({torch.bfloat16: 0.05} if DEVICE.type == "cuda" else {})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("group", "kv_heads", "dim", "lengths"),
    [(2, [2, 1], 12, [1, 65, 64, 600]), (1, [2], 128, [7, 520]), (7, [2], 32, [0, 3]), (4, [1], 256, [70])],
)
def test_all_requests_in_one_call_as_each_alone(group, kv_heads, dim, lengths, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    caches = [RequestCache([n + 2] * len(kv_heads), kv_heads, dim, dtype, DEVICE) for n in lengths]
    for i, (cache, n) in enumerate(zip(caches, lengths, strict=True)):
        for layer, heads in enumerate(kv_heads):
            cache.append(layer, draw(n, heads, dim), draw(n, heads, dim))
        if i % 2:
            cache.set_bias(draw(max(1, n - 3)).abs())
    nobody = [0, 0, 0, 0]
    table = torch.tensor([nobody, *(cache.place(0) for cache in caches), nobody], device=DEVICE)
    for layer, heads in enumerate(kv_heads):
        qkv = draw(len(table), (group + 2) * heads, dim)
        query, key, value = qkv.split([group * heads, heads, heads], 1)
        found = attention_triton.append_and_attend(query, key, value, table, sum(kv_heads[:layer]), 0.3)
        for i, cache in enumerate(caches, 1):
            keys, values = cache._slabs[layer][:, :, : cache.lengths[layer] + 1]
            assert torch.equal(keys[:, -1], key[i]) and torch.equal(values[:, -1], value[i])
            cache.append_row(layer)
            wanted = attend(query[i : i + 1], keys, values, scale=0.3, bias=cache.bias(layer))
            torch.testing.assert_close(found[i : i + 1], wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_request_is_the_same_bit_for_bit_beside_others():
    torch.manual_seed(0)
    caches = [RequestCache([n + 1], [2], 16, torch.float32, DEVICE) for n in (90, 300, 5)]
    for cache in caches:
        cache.append(0, *torch.randn(2, cache.capacity[0] - 1, 2, 16, device=DEVICE))
    query, key, value = torch.randn(3, 8, 16, device=DEVICE).split([4, 2, 2], 1)
    places = torch.tensor([cache.place(0) for cache in caches], device=DEVICE)
    together = attention_triton.append_and_attend(query, key, value, places, 0, 0.3)
    alone = attention_triton.append_and_attend(query[1:2], key[1:2], value[1:2], places[1:2], 0, 0.3)
    assert torch.equal(together[1:2], alone)


def test_nan_in_a_cache_is_not_hidden_and_harms_no_other():
    caches = [RequestCache([70], [1], 16, torch.float32, DEVICE) for _ in range(2)]
    for cache in caches:
        cache.append(0, *torch.ones(2, 66, 1, 16, device=DEVICE))
    caches[1].keys(0)[:, 3] = torch.nan
    rows = torch.ones(2, 1, 16, device=DEVICE)
    found = attention_triton.append_and_attend(rows, rows, rows, torch.tensor([c.place(0) for c in caches], device=DEVICE), 0, 1.0)
    assert torch.isfinite(found[0]).all() and found[1].isnan().all()


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from models.kernels.attention_triton import _attend, _join

def ptx(kernel, types, constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    multiples = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name] not in ("constexpr", "fp32")}
    return compile(ASTSource(kernel, signature, values, multiples), target=GPUTarget("cuda", 90, 32)).asm["ptx"]

floats = dict.fromkeys(("mixed", "tops", "weights"), "*fp32")
rows = dict.fromkeys(("query", "key", "value", "out"), "*bf16")
counts = dict.fromkeys(("query_stride", "key_stride", "value_stride", "heads_before"), "i32")
types = floats | rows | counts | {"table": "*i64", "scale": "fp32"}
sizes = {"DIM": 128, "WIDTH": 128, "SPLITS": 8}
heads = {"KV_HEADS": 8, "GROUP": 4, "GROUP_WIDTH": 16, "ROWS": 64, "ALIGNMENT": 16}
assert "cp.async.cg" in ptx(_attend, types, sizes | heads), "keys and values are not copied by 16 bytes"
ptx(_join, types, sizes)
"""


def test_the_kernels_compile_for_a_card_that_is_not_there():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
