"""The most memory a piece of work holds."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """High-water mark while `work` runs, what was held before included.

    On a GPU that is all that torch has allocated; on a CPU all that the process has resident, libraries too.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):  # where the kernel does not let the mark be reset, it is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
    work()
    return high_water()


def high_water() -> int:
    status = Path("/proc/self/status")
    mark = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if mark:
        return int(mark[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
