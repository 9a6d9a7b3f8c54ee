"""The served curve: random weights behind the server, with ever more requests at once, at the fullest level and at a cheap one."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import http, peers
from benchmarks.serving import serve

LEVELS = ("off", "strong")
CONCURRENCY = (64, 16, 4, 1)
MAX_TOKENS = 16
LEAST_REQUESTS, ROUNDS = 8, 2
"""Requests at each point: so many, or so many times those at once."""


def run(geometry: str, device: str) -> list[dict[str, Any]]:
    """Measure and print: the documents of `benchmarks.http`, one for each level and number of requests at once."""
    documents = []
    with TemporaryDirectory() as directory:
        peers.write(geometry, Path(directory))
        with serve(directory, "--device", device, "--max-batch", str(max(CONCURRENCY))) as served:
            # The most at once come first: what they find not compiled yet weighs least there.
            for level, concurrency in product(LEVELS, CONCURRENCY):
                requests = max(LEAST_REQUESTS, ROUNDS * concurrency)
                documents.append(http.run(served.url, concurrency, requests, level, MAX_TOKENS, quiet=True))
    return documents
