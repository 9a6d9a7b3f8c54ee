"""Threads follow what a process may use. loky reads quotas; here its files are put in the place of the machine's."""

from __future__ import annotations

import builtins
import io
import os
import subprocess
import sys

import pytest

from server.threads import limit_threads

V2, QUOTA, PERIOD = "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"


@pytest.fixture
def machine(monkeypatch):
    """Sixteen CPUs without limits, and a function that sets some."""
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "LOKY_MAX_CPU_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    exists, read = os.path.exists, builtins.open

    def limit(files: dict[str, str], affinity: int = 16) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(affinity)))
        monkeypatch.setattr(os.path, "exists", lambda path: path in files if path in (V2, QUOTA, PERIOD) else exists(path))
        monkeypatch.setattr(
            builtins, "open", lambda path, *a, **k: io.StringIO(files[path]) if path in files else read(path, *a, **k)
        )

    limit({})
    return limit


@pytest.mark.parametrize(
    ("files", "affinity", "threads"),
    [
        ({V2: "400000 100000"}, 16, "4"),
        ({V2: "150000 100000"}, 16, "2"),
        ({V2: "max 100000"}, 16, None),
        ({QUOTA: "300000", PERIOD: "100000"}, 16, "3"),
        ({QUOTA: "-1", PERIOD: "100000"}, 16, None),
        ({V2: "800000 100000"}, 2, "2"),
        ({}, 16, None),
    ],
)
def test_threads_follow_quota_and_affinity(machine, files, affinity, threads):
    machine(files, affinity)
    limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == threads
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


def test_what_is_said_wins_over_what_is_found(machine, monkeypatch):
    machine({V2: "400000 100000"})
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    limit_threads()
    assert (os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]) == ("3", "active")
    limit_threads(5)
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_torch_is_not_there_before_its_threads_are_limited():
    code = "import sys, espalier, server.settings, server.threads; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
