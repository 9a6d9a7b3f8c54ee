"""y = x W^T + b with a sparse weight, in three formats: bitmask, 2:4 and packed."""

from __future__ import annotations

import ctypes
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
from models.quantized import Int8Linear, Nf4Linear

GROUP, CODES = 64, 16
"""Weights that the CPU kernels read at a time; high bytes that have a code."""


@dataclass
class SparseLinear:
    """A 16-bit weight held as its non-zeros and one bit per weight, for inference.

    values [non-zeros] row by row; masks [out, ceil(in / 32)] int32, bit i of word j for weight 32 j + i; offsets [out + 1] int64,
    where each row's values start. A GPU multiplies a few rows from this format. More rows, and any number on a CPU, meet one
    decompressed part of the weight after another, so that no second copy is held.
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
        return multiply_by_parts(x, self)

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
    """A weight with two of every four values held, in torch's format for the 2:4 units of a GPU, for inference."""

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
    """A bfloat16 weight on a CPU, held as a bit per weight and 12 bits per non-zero, without loss (ours).

    Trained weights have few magnitudes: nearly all high bytes (sign and most of the exponent) of the non-zeros are among the 16
    commonest. So a high byte is held as a code of 4 bits, and the few others in a list of exceptions.

    masks [out, ceil(in / 64)] int64, bits 2 i and 2 i + 1 of word j for weights 64 j + i and 64 j + 32 + i. In that order and row
    by row: low_bytes [non-zeros + 64] uint8, and codes [ceil(non-zeros / 64), 32] uint8, of 64 the first 32 in the lower halves.
    codebook [16] uint8: the high byte of each code. exceptions [.. + 1] int64: index << 8 | high byte of non-zeros without a code;
    the last is an end mark. starts [out + 1, 2] int64: where a row's non-zeros start, and its exceptions.
    """

    low_bytes: Tensor
    codes: Tensor
    codebook: Tensor
    exceptions: Tensor
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
        values = np.pad(values, ((0, 0), (0, -values.shape[1] % GROUP)))
        values = values.reshape(len(values), -1, 2, GROUP // 2).swapaxes(2, 3).reshape(len(values), -1)
        kept = values << 1 != 0  # but for the sign
        bits = np.packbits(kept, axis=1, bitorder="little")
        starts = np.append(0, np.bitwise_count(bits).sum(1, dtype=np.int64).cumsum())
        nonzeros = values[kept]
        high = (nonzeros >> 8).astype(np.uint8)
        codebook = np.bincount(high, minlength=256).argsort(kind="stable")[: -CODES - 1 : -1].astype(np.uint8)
        code_of = np.full(256, CODES, np.uint8)
        code_of[codebook] = np.arange(CODES)
        codes = code_of[high]
        without_code = (codes == CODES).nonzero()[0]
        codes[without_code] = 0
        first, second = np.pad(codes, (0, -len(codes) % GROUP)).reshape(-1, 2, GROUP // 2).swapaxes(0, 1)
        tensor = torch.from_numpy
        return cls(
            tensor(np.pad(nonzeros.astype(np.uint8), (0, GROUP))), tensor(first | second << 4), tensor(codebook),
            tensor(np.append(without_code << 8 | high[without_code], np.iinfo(np.int64).max)), tensor(bits.view(np.int64)),
            tensor(np.stack([starts, without_code.searchsorted(starts)], 1)), weight.shape[1], linear.bias,
        )  # fmt: skip

    def __call__(self, x: Tensor) -> Tensor:
        if kernels_take(x, "packed") and (native := kernels.library()):
            return kernels.packed_linear(native, x, self._parts, self.bias)
        return multiply_by_parts(x, self)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The weight [rows, in], or some of its rows, as it was. Raises RuntimeError where the kernels were not built."""
        if (native := kernels.library()) is None:
            raise RuntimeError("a packed weight is only read by the native CPU kernels, which are not there")
        first, last, _ = rows.indices(len(self.masks))
        out = torch.empty(last - first, self.inputs, dtype=torch.bfloat16)
        return kernels.decompress(native, self._parts, first, out)

    @property
    def outputs(self) -> int:
        return len(self.masks)

    def native_table(self) -> ctypes.Array[ctypes.c_int64]:
        """Where the parts lie, as the kernels take it; it does not keep them alive."""
        return kernels.packed_table(self._parts)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        """In the order in which the kernels take them."""
        return self.low_bytes, self.codes, self.codebook, self.exceptions, self.masks, self.starts

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (*self._parts, self.bias) if t is not None)

    @property
    def size(self) -> int:
        return len(self.masks) * self.inputs

    @property
    def nonzeros(self) -> int:
        return len(self.low_bytes) - GROUP


AnyLinear = Linear | SparseLinear | SemiStructuredLinear | PackedLinear | Int8Linear | Nf4Linear


def multiply_by_parts(x: Tensor, matrix: SparseLinear | PackedLinear) -> Tensor:
    """The product with one decompressed part of the weight after another."""
    outputs = len(matrix.masks)
    out = x.new_empty(*x.shape[:-1], outputs)
    for first in range(0, outputs, thresholds.DENSE_PART):
        here = slice(first, first + thresholds.DENSE_PART)
        out[..., here] = F.linear(x, matrix.dense(here), None if matrix.bias is None else matrix.bias[here])
    return out
