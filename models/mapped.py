"""Weights that are read through a mapping of their file: once copied, their pages are given back."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

FILE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ [1-9]\d* +.*\.safetensors$", re.MULTILINE)


def give_back(tensors: Sequence[Tensor]) -> None:
    """Have the process hold the pages of tensors that lie in mapped safetensors no longer; they are read again if they are needed.

    safetensors maps its files, and what was read of them counts as held until the whole mapping goes: without this, half a model is
    held twice while it is loaded. Other tensors, and other systems than Linux, are left alone.
    """
    if sys.platform != "linux":
        return
    mapped = [(int(start, 16), int(end, 16)) for start, end in FILE.findall(Path("/proc/self/maps").read_text())]
    for tensor in tensors:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(start <= first and last <= end for start, end in mapped):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)
