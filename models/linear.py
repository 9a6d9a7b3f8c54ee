"""y = x W in each form a weight can take. For now there is one form: dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Linear:
    """`x [rows, in] -> [rows, out]`; `weight` is [out, in]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.weight, self.bias) if t is not None)


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
        module.weight = module.bias = None
    return Linear(weight, bias)
