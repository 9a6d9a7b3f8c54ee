"""A server of its own for a benchmark: started, watched from outside, and ended."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import httpx

START_S = 600.0
"""Longest wait for weights to load."""


@dataclass(frozen=True)
class Served:
    """A server process and where it answers."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def resident_bytes(self) -> int:
        """Memory that the process has resident now. Linux tells it; elsewhere FileNotFoundError."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024


@contextmanager
def serve(*arguments: str) -> Iterator[Served]:
    """`espalier serve` with these arguments on a free port, until the block ends. Raises ConnectionError with the last line of the
    log when it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "espalier", "serve", *arguments, "--port", str(port)]
    with TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            served = Served(f"http://127.0.0.1:{port}", process)
            if not _is_ready(served):
                log.seek(0)
                raise ConnectionError(f"the server did not start: {log.read().decode().strip().rpartition(chr(10))[2]}")
            yield served
        finally:
            process.terminate()


def _is_ready(served: Served) -> bool:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and served.process.poll() is None:
        try:
            if httpx.get(f"{served.url}/ready").status_code == 200:
                return True
        except httpx.TransportError:
            time.sleep(0.1)
    return False
