"""Whether a checkpoint fits into the memory that is left, before any of it is taken."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic

import torch

from models.checkpoint import footprint
from models.llava import return_freed_memory

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP, HOST, OWN = Path("/proc/self/cgroup"), Path("/proc/meminfo"), Path("/proc/self/statm")
GROWN, EVERY_S = 16 * 2**20, 5.0
"""Bytes that the process must have grown by before freed memory is looked for, and the time from one look to the next."""


class OutOfMemory(ValueError):
    """A checkpoint and its KV cache do not fit; the message has the figures."""


def check_room(directory: Path, device: str, dtype: str, kv_tokens: int, promised: int) -> None:
    """Raises OutOfMemory where weights and a KV cache of so many tokens need more than is free and not `promised` to other caches;
    CheckpointError for a checkpoint that is none. No weight is read."""
    need = footprint(directory, dtype)
    kv, free = kv_tokens * need.kv_token_bytes, max(0, free_bytes(device) - promised)
    if need.weight_bytes + kv > free:
        cache = f" and {kv / 1e9:.2f} GB for its KV cache" if kv else ""
        raise OutOfMemory(
            f"the checkpoint needs {need.weight_bytes / 1e9:.2f} GB for weights{cache}, and {free / 1e9:.2f} GB are free and not "
            "promised to other models; unload one, or set a smaller kv_tokens"
        )


class FreedMemory:
    """Gives freed memory back to the system once a burst is over: glibc keeps what threads have freed, in an arena for each."""

    def __init__(self) -> None:
        self._least, self._last = resident_bytes(), -EVERY_S

    def give_back(self) -> None:
        """If the process is larger than it has been, and not too often: what is in use now may be free next time."""
        if resident_bytes() > self._least + GROWN and monotonic() - self._last >= EVERY_S:
            return_freed_memory()
            self._least, self._last = min(self._least, resident_bytes()), monotonic()


def resident_bytes() -> int:
    """What of this process is in memory; 0 where that is not known."""
    return int(OWN.read_text().split()[1]) * resource.getpagesize() if OWN.exists() else 0


def free_bytes(device: str) -> int:
    """What can still be taken on a device; of the host's memory no more than the cgroup leaves."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    fields = dict(line.split(":") for line in HOST.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) * 1024, *_cgroups())


def _cgroups() -> Iterator[int]:
    """What each memory cgroup above this process leaves, version 2 or 1. Cached files count as free: they go first."""
    yield 2**63  # for min() where there is none
    names = {"": ("memory.max", "memory.current", "inactive_file"),
             "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}  # fmt: skip
    for line in MEMBERSHIP.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in names:
            continue
        limit, usage, cached = names[controllers]
        below = Path(path.lstrip("/"))
        for group in (below, *below.parents):  # in a container the path may be that of the host: then only its root is here
            folder = CGROUPS / controllers / group
            with suppress(OSError, ValueError, KeyError):  # `max` is no number: no limit
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int((folder / limit).read_text()) - int((folder / usage).read_text()) + int(stat[cached])
