"""The README's commands work as written, against the server that `make serve` runs."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "espalier", "serve", "--port", str(number)], cwd=ROOT)
    try:
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{number}/ready").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
            assert server.poll() is None, "the server ended"
        yield number
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0  # SIGTERM is a clean end


def run(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_curl_answers_right_with_a_receipt(port: int) -> None:
    block = next(b for b in blocks("sh") if "curl" in b)
    expected = ["four", "9e", "purple", "yellow"]
    for command, answer in zip(block.strip().splitlines(), expected, strict=True):
        out = run("bash", "-c", command.replace("localhost:8000", f"127.0.0.1:{port}"))
        assert f'"answer":"{answer}"' in out.lower(), command
        assert '"visual_tokens_total"' in out


def test_the_openai_client_example_runs_and_three_ways_agree(port: int) -> None:
    code = blocks("python")[0].replace("localhost:8000", f"127.0.0.1:{port}")
    first, *others = run(sys.executable, "-c", code).strip().splitlines()
    assert first == "white"
    assert len(others) == 3
    # The same answer by the same route; only the reason tells which way the level was chosen.
    assert len({re.sub("'reason': '[a-z]+'", "", line) for line in others}) == 1
