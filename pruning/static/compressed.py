"""A pruned weight on disk: a bit for each weight, and the values that are not zero. Without loss but for the sign of zeros."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def compress(weight: Tensor) -> dict[str, Tensor]:
    """bits [ceil(size / 8)] uint8 and values [non-zeros], in order and on the CPU."""
    flat = weight.detach().flatten().cpu()
    kept = flat != 0
    return {"bits": torch.from_numpy(np.packbits(kept.numpy())), "values": flat[kept]}


def decompress(bits: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The weight of that shape, on the CPU."""
    kept = torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel()).view(np.bool_))
    return values.new_zeros(shape.numel()).masked_scatter_(kept, values).view(shape)


def compressed_bytes(weights: int, density: float, itemsize: int) -> int:
    """What `weights` of `itemsize` bytes take on disk, a share `density` of them not zero."""
    return round(weights * (1 / 8 + density * itemsize))
