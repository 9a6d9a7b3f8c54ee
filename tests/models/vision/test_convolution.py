"""The native network against torch's convolutions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import kernels
from models.vision.convolution import NativeEfficientNet
from models.vision.efficientnet import EfficientNetLite, EfficientNetLiteConfig, EfficientNetLiteTower, EfficientNetTower

pytestmark = pytest.mark.skipif(kernels.convolution_library() is None, reason="needs the native kernels, and AVX-512")


def random_net(blocks: Any, stem: int = 8, dtype: torch.dtype = torch.float32) -> EfficientNetLite:
    net = EfficientNetLite(EfficientNetLiteConfig(stem=stem, blocks=blocks, head=8)).eval()
    for conv in net.modules():
        if isinstance(conv, torch.nn.Conv2d):
            torch.nn.init.normal_(conv.weight, std=(2 / conv.weight[0].numel()) ** 0.5)
            torch.nn.init.normal_(conv.bias, std=0.3)
    return net.to(dtype)


@torch.no_grad()
def check(net: EfficientNetLite, pictures: list[Tensor]) -> None:
    native = NativeEfficientNet.of(net)
    assert native
    for picture, found in zip(pictures, native(pictures), strict=True):
        for expected, got in zip(net(picture[None]), found, strict=True):
            assert torch.allclose(got, expected[0].permute(1, 2, 0), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


BLOCK = st.tuples(st.sampled_from([3, 5]), st.sampled_from([1, 2]), st.integers(1, 6), st.sampled_from([8, 16, 20, 24, 72, 84]))
SIDE = st.integers(128, 160)  # at most seven strides of two


@settings(max_examples=15, deadline=None)
@given(
    first=st.tuples(st.sampled_from([3, 5]), st.sampled_from([1, 2]), st.just(1), st.sampled_from([8, 24])),
    blocks=st.lists(BLOCK.filter(lambda block: block[2] > 1), min_size=1, max_size=3),
    stem=st.sampled_from([16, 32, 40]),
    sizes=st.lists(st.tuples(SIDE, SIDE), min_size=1, max_size=2),
    seed=st.integers(0, 1000),
)
def test_maps_are_those_of_torch(first: Any, blocks: Any, stem: int, sizes: Any, seed: int) -> None:
    torch.manual_seed(seed)
    strided = (3, 2, 2, 16)
    check(random_net([first, *blocks, strided, blocks[0]], stem), [torch.randn(3, *size) for size in sizes])


@pytest.mark.parametrize("kernel", [3, 5])
def test_residual_of_large_and_small_maps(kernel: int) -> None:
    torch.manual_seed(0)
    net = random_net([(3, 1, 1, 24), (kernel, 1, 6, 24), (kernel, 2, 6, 80), (kernel, 1, 6, 80)])
    assert [block.residual for block in net.blocks] == [False, True, False, True]
    check(net, [torch.randn(3, 160, 96)])


def test_results_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    native = NativeEfficientNet.of(random_net([(3, 1, 1, 16), (5, 2, 6, 40), (5, 1, 6, 40)]))
    assert native
    picture, threads, found = torch.randn(3, 96, 96), torch.get_num_threads(), []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found += native([picture])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_other_blocks_run_through_torch() -> None:
    assert NativeEfficientNet.of(random_net([(3, 1, 1, 16), (7, 2, 6, 40)])) is None
    assert NativeEfficientNet.of(random_net([(3, 2, 2, 16), (3, 2, 6, 40)])) is None
    assert NativeEfficientNet.of(random_net([(3, 1, 1, 8), (3, 2, 6, 40)])) is None
    assert NativeEfficientNet.of(random_net([(3, 2, 1, 16)])) is None


@pytest.mark.parametrize("tags", [0, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_tower_gives_the_tokens_of_its_module(dtype: torch.dtype, tolerance: float, tags: int) -> None:
    torch.manual_seed(0)
    blocks = [(3, 2, 1, 8), (3, 2, 4, 24), (5, 2, 4, 24), (5, 2, 4, 40)]
    config = EfficientNetLiteConfig(image_size=64, wide_size=32, stem=8, blocks=blocks, head=48, hidden_size=32, tags=tags)
    module = EfficientNetLiteTower(config).eval()
    seeing = [module, module.tagger] if module.tagger else [module]
    for part in seeing:
        part.net = random_net(config.blocks)
        part.net.head = torch.nn.Conv2d(40, 48, 1)
    if module.tagger:
        torch.nn.init.normal_(module.tagger.classes.weight)
        torch.nn.init.normal_(module.tagger.words.weight)
        module.tagger.groups[torch.arange(1000) % 5, torch.arange(1000)] = 1
    module.to(dtype)
    pixels = torch.randn(2, 3, 64, 64, dtype=dtype)
    expected = module(pixels).last_hidden_state
    stored = EfficientNetTower(module).other_bytes
    assert stored == sum(parameter.nbytes for parameter in module.parameters())
    tower = EfficientNetTower(module, *(NativeEfficientNet.of(part.net) for part in seeing))
    tokens = tower(pixels).tokens
    assert tokens.dtype == dtype
    assert torch.allclose(tokens.float(), expected.float(), atol=tolerance)
    assert tower.other_bytes > stored, "what the native code holds counts too"
