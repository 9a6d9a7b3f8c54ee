"""y = x W with a dense weight; for the others see `sparse`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels

DENSE_ROWS = 8
NARROW_ROWS = 32
"""Rows up to which our kernel multiplies by a dense weight faster than torch: any weight, or a narrow one."""
NARROW_INPUTS = 2048
"""Eight rows of x that are no wider stay in a first-level cache of 48 KB beside the weights."""
TILED_ROWS, TILED_VALUES = 240, 560 << 10
"""Rows, and values in all of them, up to which our product on tiles is faster than torch's for a dense weight: up to four times at
16 rows, 1.1 to 1.3 times at 168 of 2048 values. With more it takes 0.95 to 1.1 times as long."""


@dataclass
class Linear:
    """`x [rows, in] -> [rows, out]`; `weight` is [out, in]."""

    weight: Tensor
    bias: Tensor | None = None
    form: ClassVar = "dense"

    def __call__(self, x: Tensor) -> Tensor:
        if kernels.tiles():
            few = min(TILED_ROWS, TILED_VALUES // x.shape[-1])
        else:
            few = NARROW_ROWS if x.shape[-1] <= NARROW_INPUTS else DENSE_ROWS
        if is_few(x, few) and _is_plain(self.weight) and (native := kernels.library()):
            return kernels.dense(native, x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.bias) if t is not None)

    @property
    def size(self) -> int:
        """Weights, zeros among them."""
        return self.weight.numel()

    @property
    def nonzeros(self) -> int:
        return int(self.weight.count_nonzero())


def take(*modules: nn.Linear) -> Linear:
    """Fuse linears that read the same rows into one, output after output, and empty the modules they came from.

    Emptying as we go keeps one copy of the weights: at no time is more than one fused matrix held twice.
    """
    biases = [m.bias for m in modules]
    if len(modules) == 1:
        weight = modules[0].weight.detach()
        bias = biases[0].detach() if biases[0] is not None else None
    else:
        weight = torch.cat([m.weight.detach() for m in modules])
        bias = None
        if any(b is not None for b in biases):
            zeros = [weight.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in modules]
            bias = torch.cat(zeros)
    for module in modules:
        module.weight = module.bias = None  # type: ignore[assignment]
    return Linear(weight, bias)


def is_few(x: Tensor, rows: int) -> bool:
    """Whether the kernels compute this: their type and place, few enough rows, and no gradient asked for."""
    return x.dtype == torch.bfloat16 and x.dim() == 2 and 0 < len(x) <= rows and x.device.type == "cpu" and not x.requires_grad


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous() and not weight.requires_grad
