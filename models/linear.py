"""y = x W^T + b with a dense weight; `sparse` has the other formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels
from models.kernels import thresholds
from models.mapped import give_back


@dataclass
class Linear:
    """`x [rows, in] -> [rows, out]`; `weight` is [out, in]."""

    weight: Tensor
    bias: Tensor | None = None
    format: ClassVar = "dense"

    def __call__(self, x: Tensor) -> Tensor:
        if kernels_take(x, "dense") and _is_plain(self.weight) and (native := kernels.library()):
            return kernels.dense_linear(native, x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    def unrounded(self, x: Tensor) -> Tensor:
        """The same in float32. On a CPU its sums are not rounded to bfloat16, in which the largest logits are often equal."""
        if x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return self(x).float()
        if _is_plain(self.weight) and not x.requires_grad and (native := kernels.unrounded_library()):
            return kernels.unrounded_linear(native, x, self.weight, self.bias)
        parts = self.weight.split(thresholds.DENSE_PART)  # all of them in float32 would be twice the memory of the weight
        y = torch.cat([F.linear(x.float(), part.float()) for part in parts], -1)
        return y if self.bias is None else y + self.bias

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


def fuse(*modules: nn.Linear) -> Linear:
    """Fuse linears that read the same rows into one, output after output, and empty their modules.

    So the weights are held once, but for the matrix that is being fused.
    """
    biases = [m.bias for m in modules]
    if len(modules) == 1:
        weight = modules[0].weight.detach()
        bias = biases[0].detach() if biases[0] is not None else None
    else:
        weight = torch.cat([m.weight.detach() for m in modules])
        give_back([m.weight for m in modules])
        bias = None
        if any(b is not None for b in biases):
            zeros = [weight.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in modules]
            bias = torch.cat(zeros)
    for module in modules:
        module.weight = module.bias = None  # type: ignore[assignment]
    return Linear(weight, bias)


def kernels_take(x: Tensor, weight_format: thresholds.Format) -> bool:
    """Whether the CPU kernels multiply x: bfloat16 on the CPU, as many rows as they are good at, and no gradient asked for."""
    if x.dtype != torch.bfloat16 or x.dim() != 2 or not len(x) or x.device.type != "cpu" or x.requires_grad:
        return False
    return thresholds.ours(weight_format, len(x), x.shape[1], kernels.many_rows())


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous() and not weight.requires_grad
