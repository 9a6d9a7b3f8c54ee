"""EfficientNet-Lite on the CPU in native code, an inverted bottleneck a call (`kernels/convolution.cpp`): float32, whatever type
the checkpoint has."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels

if TYPE_CHECKING:
    from models.vision.efficientnet import Conv, EfficientNetLite, InvertedBottleneck

LANES = 16
"""Channels that lie side by side."""


class _Bottleneck(ctypes.Structure):
    """`Bottleneck` of kernels/convolution.cpp; the next one has its name there too."""

    _fields_ = [
        *((name, kernels.POINTER) for name in ("expand", "expand_bias", "depthwise", "depthwise_bias", "project", "project_bias")),
        *((name, kernels.COUNT) for name in ("inputs", "wide", "outputs", "kernel", "stride", "residual", "stem")),
    ]  # fmt: skip


class _Picture(ctypes.Structure):
    _fields_ = [("input", kernels.POINTER), ("output", kernels.POINTER), ("height", kernels.COUNT), ("width", kernels.COUNT)]


@dataclass(frozen=True)
class NativeEfficientNet:
    """The network's blocks, the stem in the first one, with weights of their own. `fine` is the block that the finer map is the
    input of."""

    native: ctypes.CDLL
    blocks: Sequence[_Bottleneck]
    fine: int
    held: Sequence[Tensor]  # what the pointers point into

    @classmethod
    @torch.no_grad()
    def of(cls, net: EfficientNetLite) -> NativeEfficientNet | None:
        """None where the native code is not built, for another device, and for blocks that it does not know."""
        native, blocks = kernels.convolution_library(), cast("list[InvertedBottleneck]", [*net.blocks])
        if native is None or net.stem.weight.device.type != "cpu" or net.last_stride == 0 or not _known(blocks):
            return None
        held: list[Tensor] = []

        def point(block: InvertedBottleneck) -> _Bottleneck:
            expand = _pack(block.expand) if block.expand else _pack_stem(net.stem)
            depthwise, weights = block.depthwise, [*expand, *_pack(block.depthwise), *_pack(block.project)]
            held.extend(weights)
            return _Bottleneck(
                *(weight.data_ptr() for weight in weights), expand[0].shape[1], depthwise.in_channels, block.project.out_channels,
                depthwise.kernel_size[0], depthwise.stride[0], block.residual, not block.expand,
            )  # fmt: skip

        return cls(native, [point(block) for block in blocks], net.last_stride, held)

    def __call__(self, pictures: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Pictures [3, height, width], each of any size, to their finer and coarser maps [height, width, channels] in float32.

        Raises ValueError for a picture that is smaller than the stride.
        """
        stride = 2 * math.prod(block.stride for block in self.blocks)
        if any(min(picture.shape[1:]) < stride for picture in pictures):
            raise ValueError(f"a picture must have at least {stride} pixels a side")
        maps, fine = [picture.float().contiguous() for picture in pictures], []
        for index, block in enumerate(self.blocks):
            if index == self.fine:
                fine = maps
            planes, stride = -(-block.outputs // LANES), block.stride * (1 + block.stem)
            outputs = [x.new_empty(planes, x.shape[1] // stride, x.shape[2] // stride, LANES) for x in maps]
            table = (_Picture * len(maps))(
                *(_Picture(x.data_ptr(), y.data_ptr(), *x.shape[1:3]) for x, y in zip(maps, outputs, strict=True))
            )
            self.native.inverted_bottleneck(ctypes.byref(block), table, len(maps), torch.get_num_threads())
            maps = outputs
        return [
            (_channels_last(finer, self.blocks[self.fine - 1].outputs), _channels_last(coarser, self.blocks[-1].outputs))
            for finer, coarser in zip(fine, maps, strict=True)
        ]


def _known(blocks: Sequence[InvertedBottleneck]) -> bool:
    first, *others = blocks
    if first.expand or first.residual or not all(block.expand for block in others):
        return False
    return all(block.depthwise.kernel_size[0] in (3, 5) and block.depthwise.stride[0] in (1, 2) for block in blocks)


def _channels_last(x: Tensor, channels: int) -> Tensor:
    """[channels / 16, height, width, 16] to [height, width, channels]."""
    return x.permute(1, 2, 0, 3).flatten(2)[..., :channels]


def _pack(conv: Conv) -> tuple[Tensor, Tensor]:
    """Weight [outputs / 16, inputs, 16] and bias; of a depthwise convolution, the kernel's places are the inputs."""
    return _lanes(conv.weight.flatten(1), conv.bias)


def _pack_stem(conv: Conv) -> tuple[Tensor, Tensor]:
    """27 inputs, and one of zeros: `gather_stem` leaves the 16th value of its first register empty."""
    weight = conv.weight.flatten(1)
    return _lanes(torch.cat([weight[:, :15], weight.new_zeros(len(weight), 1), weight[:, 15:]], dim=1), conv.bias)


def _lanes(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    assert bias is not None
    more = -len(weight) % LANES
    packed = F.pad(weight.float(), (0, 0, 0, more)).unflatten(0, (-1, LANES)).transpose(1, 2).contiguous()
    return packed, F.pad(bias.float(), (0, more))
