"""y = x W in the forms that a sparse weight can take."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse import to_sparse_semi_structured

from models import kernels
from models.kernels import thresholds
from models.linear import Linear, kernels_take

BOTH, CODES = 64, 16
"""Weights, and non-zeros, that the CPU kernels take at a time; and upper bytes that have a code."""


@dataclass
class SparseLinear:
    """The same product with a 16-bit weight held as its non-zeros and one bit per weight, for inference.

    values [non-zeros] row by row; masks [out, ceil(in / 32)] int32, bit i of word j for weight 32 j + i; offsets
    [out + 1] int64, where each row's values start. A few rows are multiplied from this form on a GPU; more of them, and
    any number on a CPU, from a dense part at a time, so that no second copy is ever held.
    """

    values: Tensor
    masks: Tensor
    offsets: Tensor
    inputs: int
    bias: Tensor | None = None
    format: ClassVar = "bitmask"

    @classmethod
    def of(cls, linear: Linear) -> SparseLinear:
        """Compress a weight, bit for bit but for the sign of zeros. Raises ValueError for one that is not of 16 bits."""
        weight = linear.weight.detach()
        if weight.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"only bfloat16 and float16 weights are held sparse, not {weight.dtype}")
        kept = (weight != 0).cpu().numpy()
        bits = np.packbits(np.pad(kept, ((0, 0), (0, -weight.shape[1] % 32))), axis=1, bitorder="little")
        counts = torch.from_numpy(np.bitwise_count(bits).sum(1, dtype=np.int64))
        values = torch.from_numpy(weight.view(torch.int16).cpu().numpy()[kept]).view(weight.dtype)
        masks, offsets, device = torch.from_numpy(bits.view(np.int32)), F.pad(counts.cumsum(0), (1, 0)), weight.device
        return cls(values.to(device), masks.to(device), offsets.to(device), weight.shape[1], linear.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dim() == 2 and x.is_cuda and len(x) <= thresholds.BITMASK_GPU:
            from models.kernels import bitmask_triton

            return bitmask_triton.multiply(x, self.values, self.masks, self.offsets, self.bias)
        return by_parts(x, self)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The weight [rows, in], or some of its rows, as it was."""
        first, last, _ = rows.indices(len(self.masks))
        out = self.values.new_empty(last - first, self.inputs)
        if out.is_cuda:
            from models.kernels import bitmask_triton

            return bitmask_triton.decompress(self.values, self.masks, self.offsets, first, out)
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
        return len(self.values)


@dataclass
class SemiStructuredLinear:
    """The same product with two of every four weights held, in torch's form for the 2:4 units of a GPU, for inference."""

    weight: Tensor
    nonzeros: int
    bias: Tensor | None = None
    format: ClassVar = "2:4"

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


@dataclass
class PackedLinear:
    """The same product on a CPU with a bfloat16 weight held as a bit per weight and 12 bits per non-zero, without loss (ours).

    Trained weights are of few magnitudes: of the upper bytes of all non-zeros, which are their signs and most of their exponents,
    the 16 commonest are nearly all. So one is held as a code of 4 bits, and the rare others are put right by a list.

    masks [out, ceil(in / 64)] int64, bits 2 i and 2 i + 1 of word j for weights 64 j + i and 64 j + 32 + i. In that order and row
    by row: lower [non-zeros + 64] uint8, the lower bytes, and codes [ceil(non-zeros / 64), 32] uint8, of 64 the first 32 in the
    lower halves. upper [16] uint8: what codes stand for. rare [.. + 1] int64: place << 8 | upper byte where no code does, and one
    that is behind all. starts [out + 1, 2] int64: where a row's non-zeros start, and its rare ones.
    """

    lower: Tensor
    codes: Tensor
    upper: Tensor
    rare: Tensor
    masks: Tensor
    starts: Tensor
    inputs: int
    bias: Tensor | None = None
    format: ClassVar = "packed"

    @classmethod
    def of(cls, linear: Linear) -> PackedLinear:
        """Compress a weight, bit for bit but for the sign of zeros. Raises ValueError for one that is not bfloat16 on the CPU."""
        weight = linear.weight.detach()
        if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
            raise ValueError(f"only bfloat16 weights on the CPU are held packed, not {weight.dtype} on {weight.device}")
        values = weight.contiguous().view(torch.int16).numpy().view(np.uint16)
        values = np.pad(values, ((0, 0), (0, -values.shape[1] % BOTH)))
        values = values.reshape(len(values), -1, 2, BOTH // 2).swapaxes(2, 3).reshape(len(values), -1)
        kept = values << 1 != 0  # but for the sign
        bits = np.packbits(kept, axis=1, bitorder="little")
        starts = np.append(0, np.bitwise_count(bits).sum(1, dtype=np.int64).cumsum())
        found = values[kept]
        upper = (found >> 8).astype(np.uint8)
        common = np.bincount(upper, minlength=256).argsort(kind="stable")[: -CODES - 1 : -1].astype(np.uint8)
        code_of = np.full(256, CODES, np.uint8)
        code_of[common] = np.arange(CODES)
        codes = code_of[upper]
        rare = (codes == CODES).nonzero()[0]
        codes[rare] = 0
        first, second = np.pad(codes, (0, -len(codes) % BOTH)).reshape(-1, 2, BOTH // 2).swapaxes(0, 1)
        tensor = torch.from_numpy
        return cls(
            tensor(np.pad(found.astype(np.uint8), (0, BOTH))), tensor(first | second << 4), tensor(common),
            tensor(np.append(rare << 8 | upper[rare], np.iinfo(np.int64).max)), tensor(bits.view(np.int64)),
            tensor(np.stack([starts, rare.searchsorted(starts)], 1)), weight.shape[1], linear.bias,
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        if kernels_take(x, len(x) if kernels.has_amx() else thresholds.PACKED_AVX512) and (native := kernels.library()):
            return kernels.packed_linear(native, x, self._parts, self.bias)
        return by_parts(x, self)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The weight [rows, in], or some of its rows, as it was. Raises RuntimeError where the kernels were not built."""
        if (native := kernels.library()) is None:
            raise RuntimeError("a packed weight is only read by the native CPU kernels, which are not there")
        first, last, _ = rows.indices(len(self.masks))
        out = torch.empty(last - first, self.inputs, dtype=torch.bfloat16)
        return kernels.decompress(native, self._parts, first, out)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        """In the order in which the kernels take them."""
        return self.lower, self.codes, self.upper, self.rare, self.masks, self.starts

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self._parts, self.bias) if t is not None)

    @property
    def size(self) -> int:
        return len(self.masks) * self.inputs

    @property
    def nonzeros(self) -> int:
        return len(self.lower) - BOTH


AnyLinear = Linear | SparseLinear | SemiStructuredLinear | PackedLinear


def by_parts(x: Tensor, matrix: SparseLinear | PackedLinear) -> Tensor:
    """The product with one dense part of the weight after another."""
    outputs = len(matrix.masks)
    out = x.new_empty(*x.shape[:-1], outputs)
    for first in range(0, outputs, thresholds.DENSE_PART):
        here = slice(first, first + thresholds.DENSE_PART)
        out[..., here] = F.linear(x, matrix.dense(here), None if matrix.bias is None else matrix.bias[here])
    return out
