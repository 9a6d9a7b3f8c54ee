"""A server in a process of its own, run by a script that changes parts of it first."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def scripted_server(script: str, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its URL, once it serves; it is killed at the end."""
    with subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        url = next(found[0] for line in process.stderr if (found := re.search(r"http://\S+:\d+", line)))
        reading = threading.Thread(target=process.stderr.read)
        reading.start()
        yield process, url
        process.kill()
        reading.join()
