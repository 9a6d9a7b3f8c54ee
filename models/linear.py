"""y = x W in each form a weight can take: dense, or sparse and held compressed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import kernels

DENSE_ROWS = 8
SPARSE_ROWS = 8
TILE_BYTES = 33554432


@dataclass
class Linear:
    """`x [rows, in] -> [rows, out]`; `weight` is [out, in]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if _is_few(x, DENSE_ROWS) and _is_plain(self.weight) and (native := kernels.library()):
            return kernels.dense(native, x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.weight, self.bias) if t is not None)


@dataclass
class SparseLinear:
    """The same product with a bfloat16 weight held as its non-zeros and one bit per weight: on a CPU, for inference.

    values [non-zeros] row by row; masks [out, ceil(in / 32)] int32, bit i of word j for weight 32 j + i; offsets [out + 1] int64,
    where each row's values start. Up to SPARSE_ROWS rows are multiplied from this form; more of them from a dense tile at a
    time, so that no second copy is ever held.
    """

    values: Tensor
    masks: Tensor
    offsets: Tensor
    inputs: int
    bias: Tensor | None = None

    @classmethod
    def of(cls, linear: Linear) -> SparseLinear:
        """Compress a weight, bit for bit but for the sign of zeros. Raises ValueError for one that is not bfloat16 on the CPU."""
        weight = linear.weight.detach()
        if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
            raise ValueError(f"only bfloat16 weights on the CPU are held sparse, not {weight.dtype} on {weight.device}")
        kept = (weight != 0).numpy()
        bits = np.packbits(np.pad(kept, ((0, 0), (0, -weight.shape[1] % 32))), axis=1, bitorder="little")
        counts = torch.from_numpy(np.bitwise_count(bits).sum(1, dtype=np.int64))
        values = torch.from_numpy(weight.view(torch.int16).numpy()[kept]).view(torch.bfloat16)
        masks = torch.from_numpy(bits.view(np.int32))
        return cls(values, masks, F.pad(counts.cumsum(0), (1, 0)), weight.shape[1], linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if _is_few(x, SPARSE_ROWS) and (native := kernels.library()):
            return kernels.sparse(native, x, self.values, self.masks, self.offsets, self.bias)
        out = x.new_empty(*x.shape[:-1], len(self.masks))
        step = max(1, TILE_BYTES // (2 * self.inputs))
        for first in range(0, len(self.masks), step):
            here = slice(first, first + step)
            out[..., here] = F.linear(x, self.dense(here), None if self.bias is None else self.bias[here])
        return out

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The weight [rows, in], or some of its rows, as it was."""
        first, last, _ = rows.indices(len(self.masks))
        out = self.values.new_empty(last - first, self.inputs)
        if native := kernels.library():
            return kernels.expand(native, self.values, self.masks, self.offsets, first, out)
        bits = np.unpackbits(self.masks[first:last].numpy().view(np.uint8), axis=1, count=self.inputs, bitorder="little")
        kept = torch.from_numpy(bits.view(np.bool_))
        return out.zero_().masked_scatter_(kept, self.values[self.offsets[first] : self.offsets[last]])

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.masks, self.offsets, self.bias) if t is not None)


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


def _is_few(x: Tensor, rows: int) -> bool:
    """Whether the kernels compute this: their type and place, few enough rows, and no gradient asked for."""
    return (
        x.dtype == torch.bfloat16 and x.dim() == 2 and 0 < len(x) <= rows and x.device.type == "cpu" and not x.requires_grad
    )


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous() and not weight.requires_grad
