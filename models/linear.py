"""y = x W in each form a weight can take: dense, or sparse and held compressed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from models import kernels

DENSE_ROWS = 8
NARROW_ROWS = 32
"""Rows up to which our kernel multiplies by a dense weight faster than torch: any weight, or a narrow one."""
NARROW_INPUTS = 2048
"""Eight rows of x that are no wider stay in a first-level cache of 48 KB beside the weights."""
TILED_ROWS, TILED_VALUES = 240, 560 << 10
"""Rows, and values in all of them, up to which our product on tiles is faster than torch's for a dense weight: up to four times at
16 rows, 1.1 to 1.3 times at 168 of 2048 values. With more it takes 0.95 to 1.1 times as long."""
SPARSE_ROWS = {"cpu": 48, "cuda": 16}
"""Rows that are multiplied from the compressed form; more are faster through a dense part at a time, but for a CPU with AMX, which
takes any number as they are. Measured on the CPU alone."""
SPARE = 32
"""Values behind the last: the kernel loads 32 and takes what it needs, which is faster than to load only those by 7 % at 4 rows
and 8 % at 8 (50 and 60 % of zeros)."""
PART_ROWS = 1024
"""Rows of a dense part, which stays in cache between its expansion and its product. Both together take 1.03 to 1.05 times as
long as a dense weight at 64 to 256 rows of x, and no longer at 616; a part of 33 MB took 1.16 times as long at 160."""


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
        if _is_few(x, few) and _is_plain(self.weight) and (native := kernels.library()):
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


@dataclass
class SparseLinear:
    """The same product with a 16-bit weight held as its non-zeros and one bit per weight, for inference.

    values [non-zeros + SPARE] row by row; masks [out, ceil(in / 32)] int32, bit i of word j for weight 32 j + i; offsets
    [out + 1] int64, where each row's values start. Up to SPARSE_ROWS rows are multiplied from this form; more of them from a
    dense part at a time, so that no second copy is ever held.
    """

    values: Tensor
    masks: Tensor
    offsets: Tensor
    inputs: int
    bias: Tensor | None = None
    form: ClassVar = "bitmask"

    @classmethod
    def of(cls, linear: Linear) -> SparseLinear:
        """Compress a weight, bit for bit but for the sign of zeros. Raises ValueError for one that is not of 16 bits."""
        weight = linear.weight.detach()
        if weight.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"only bfloat16 and float16 weights are held sparse, not {weight.dtype}")
        kept = (weight != 0).cpu().numpy()
        bits = np.packbits(np.pad(kept, ((0, 0), (0, -weight.shape[1] % 32))), axis=1, bitorder="little")
        counts = torch.from_numpy(np.bitwise_count(bits).sum(1, dtype=np.int64))
        values = F.pad(torch.from_numpy(weight.view(torch.int16).cpu().numpy()[kept]), (0, SPARE)).view(weight.dtype)
        masks, offsets, device = torch.from_numpy(bits.view(np.int32)), F.pad(counts.cumsum(0), (1, 0)), weight.device
        return cls(values.to(device), masks.to(device), offsets.to(device), weight.shape[1], linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.is_cuda and len(x) <= SPARSE_ROWS["cuda"]:
            from models.kernels import bitmask_triton

            return bitmask_triton.multiply(x, self.values, self.masks, self.offsets, self.bias)
        if _is_few(x, len(x) if kernels.tiles() else SPARSE_ROWS["cpu"]) and (native := kernels.library()):
            return kernels.sparse(native, x, self.values, self.masks, self.offsets, self.bias)
        out = x.new_empty(*x.shape[:-1], len(self.masks))
        for first in range(0, len(self.masks), PART_ROWS):
            here = slice(first, first + PART_ROWS)
            out[..., here] = F.linear(x, self.dense(here), None if self.bias is None else self.bias[here])
        return out

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The weight [rows, in], or some of its rows, as it was."""
        first, last, _ = rows.indices(len(self.masks))
        out = self.values.new_empty(last - first, self.inputs)
        if out.is_cuda:
            from models.kernels import bitmask_triton

            return bitmask_triton.expand(self.values, self.masks, self.offsets, first, out)
        if native := kernels.library():
            return kernels.expand(native, self.values, self.masks, self.offsets, first, out)
        bits = np.unpackbits(self.masks[first:last].numpy().view(np.uint8), axis=1, count=self.inputs, bitorder="little")
        kept = torch.from_numpy(bits.view(np.bool_))
        return out.zero_().masked_scatter_(kept, self.values[self.offsets[first] : self.offsets[last]])

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.masks, self.offsets, self.bias) if t is not None)

    @property
    def size(self) -> int:
        return len(self.masks) * self.inputs

    @property
    def nonzeros(self) -> int:
        return len(self.values) - SPARE


@dataclass
class SemiStructuredLinear:
    """The same product with two of every four weights held, in torch's form for the 2:4 units of a GPU, for inference."""

    weight: Tensor
    nonzeros: int
    bias: Tensor | None = None
    form: ClassVar = "2:4"

    @classmethod
    def of(cls, linear: Linear) -> SemiStructuredLinear:
        """Raises RuntimeError for a device, dtype or shape that torch's kernels do not take."""
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that this part of torch is a prototype
            return cls(to_sparse_semi_structured(linear.weight.detach()), linear.nonzeros, linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @property
    def bytes(self) -> int:
        names, _ = self.weight.__tensor_flatten__()  # type: ignore[attr-defined]
        held = [getattr(self.weight, name) for name in names]
        return sum(t.nbytes for t in (*held, self.bias) if t is not None)

    @property
    def size(self) -> int:
        return self.weight.numel()


Matrix = Linear | SparseLinear | SemiStructuredLinear


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
