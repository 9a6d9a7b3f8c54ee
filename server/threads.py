"""How many threads compute, and how they wait: said in the environment, which OpenMP reads when torch is imported."""

from __future__ import annotations

import os

from loky import cpu_count


def limit_threads(threads: int = 0) -> None:
    """Let torch and our kernels compute with so many threads; 0: with what `OMP_NUM_THREADS` says, or else as many as this process
    may keep busy by its cgroup's quota and its affinity, whatever the host has.

    Threads that wait sleep, unless `OMP_WAIT_POLICY` says otherwise: cores are shared, and one that spins is taken from a thread
    that is waited for.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    elif (allowed := cpu_count()) < (os.cpu_count() or 1):  # else torch counts cores, where the system counts hardware threads
        os.environ.setdefault("OMP_NUM_THREADS", str(allowed))
