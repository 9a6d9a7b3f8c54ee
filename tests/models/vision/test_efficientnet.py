"""The convolutional tower: padding as its published weights want it, and batch norms folded in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from models.vision.efficientnet import Conv, EfficientNetLite, EfficientNetLiteConfig, EfficientNetLiteTower, Tagger, fold


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("groups", [1, 6])
def test_stride_two_pads_as_tensorflow_does(kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    conv, x = Conv(6, 6, kernel, 2, groups), torch.randn(2, 6, 12, 12)
    before = (kernel - 2) // 2
    after = kernel - 2 - before
    expected = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, conv.bias, 2, groups=groups)
    assert torch.allclose(conv(x), expected, atol=1e-6)


def test_folded_weights_are_convolution_and_batch_norm() -> None:
    torch.manual_seed(0)
    conv, norm = torch.nn.Conv2d(3, 8, 3, 2, bias=False), torch.nn.BatchNorm2d(8, eps=1e-3).eval()
    for values in (norm.weight, norm.bias, norm.running_mean):
        torch.nn.init.normal_(values)
    published = {"_conv_stem.weight": conv.weight} | {f"_bn0.{name}": value for name, value in norm.state_dict().items()}
    folded = fold({name: value.detach() for name, value in published.items()})
    net = EfficientNetLite(EfficientNetLiteConfig(stem=8, blocks=[(3, 2, 1, 8)], head=8))
    net.stem.load_state_dict({name: folded[f"stem.{name}"] for name in ("weight", "bias")})
    x = torch.randn(1, 3, 10, 10)
    assert torch.allclose(net.stem(x), norm(conv(F.pad(x, (0, 1, 0, 1)))), atol=1e-5)


def small_config() -> EfficientNetLiteConfig:
    blocks = [(3, 2, 1, 8), (3, 2, 2, 8), (3, 2, 2, 8), (3, 2, 2, 8), (3, 1, 2, 10)]
    return EfficientNetLiteConfig(
        image_size=64, wide_size=64, stem=8, blocks=blocks, head=12, hidden_size=16, neck_layers=1, tags=2
    )


@torch.no_grad()
def test_tags_are_probabilities_of_names_that_classes_share() -> None:
    torch.manual_seed(0)
    tagger = Tagger(small_config())
    tagger.groups.zero_()
    tagger.groups[0, :400] = tagger.groups[1, 400:999] = 1
    tags = tagger.tags(torch.randn(1, 3, 3, 10))
    classes = torch.softmax(tagger.classes(F.relu6(tagger.net.head(torch.zeros(1, 10, 1, 1))).flatten(1)), -1)
    nothing = tagger.tags(torch.zeros(1, 1, 1, 10))[0, 0, 0]
    assert tags.shape == (1, 3, 3, 2) and tags.min() > 0 and tags.sum(-1).max() < 1
    torch.testing.assert_close(nothing, torch.stack([classes[0, :400].sum(), classes[0, 400:999].sum()]))


@torch.no_grad()
def test_tags_are_added_to_the_tokens_where_they_are_said() -> None:
    torch.manual_seed(0)
    tower, pixels = EfficientNetLiteTower(small_config()).eval(), torch.randn(1, 3, 64, 64)
    maps = tower.maps(pixels)
    assert tower.tagger and maps.tags is not None
    tower.tagger.words.weight.normal_()
    silent = tower.tokens(replace(maps, tags=torch.zeros_like(maps.tags)))
    left = torch.zeros_like(maps.tags)
    left[:, :, 0, 1] = 1
    more = (tower.tokens(replace(maps, tags=left)) - silent).unflatten(1, (2, 2))
    torch.testing.assert_close(more[:, :, 0], tower.tagger.words.weight[:, 1].expand_as(more[:, :, 0]))
    assert not more[:, :, 1].any()
