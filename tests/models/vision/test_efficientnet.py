"""The convolutional tower: padding as its published weights want it, and batch norms folded in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.vision.efficientnet import Conv, EfficientNetLite, EfficientNetLiteConfig, fold


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
