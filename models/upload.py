"""Small tables of whole numbers, from the host to where they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The values as a tensor on a device. A GPU is not waited for: it copies from pinned memory, which torch keeps until then."""
    gpu = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=gpu).to(device, non_blocking=gpu)
