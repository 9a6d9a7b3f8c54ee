"""After a burst the server is as small as before, but for its caches."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image

from server.memory import FreedMemory, resident_bytes
from tests.deploy.live import free_port, wait_for
from tests.server.client import body, image_part
from tests.server.fake_engine import data_url

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc keeps what is freed")
PAGE = 4096


def test_freed_memory_goes_back() -> None:
    freed = FreedMemory()
    blocks = [bytearray(b"x") * 100_000 for _ in range(1000)]
    del blocks[::2]  # those between hold the heap's end
    before = resident_bytes()
    freed.give_back()
    assert before - resident_bytes() > 25 * 2**20
    assert len(blocks) == 500


@pytest.fixture
def server() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    with subprocess.Popen([sys.executable, "-m", "espalier", "serve", "--port", str(port)], stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: httpx.get(f"{url}/ready").status_code == 200, process)
        yield process, url
        process.terminate()


@pytest.mark.slow
def test_a_burst_leaves_nothing_behind(server: tuple[subprocess.Popen[bytes], str]) -> None:
    process, url = server

    def resident() -> float:
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * PAGE / 1e6

    def send(payload: object) -> int:
        return httpx.post(f"{url}/v1/chat/completions", json=payload, timeout=120).status_code

    sample = next(Path("docs/samples").glob("*.png")).read_bytes()
    file = BytesIO()
    Image.frombytes("RGB", (1800, 1700), random.Random(0).randbytes(1800 * 1700 * 3)).save(file, "PNG")
    small, large = image_part(data_url(sample)), image_part(data_url(file.getvalue()))  # 9 MB of noise
    assert send(body(small, model=None, max_tokens=4)) == 200
    time.sleep(2)
    quiet = resident()
    with ThreadPoolExecutor(40) as pool:
        heavy = list(pool.map(send, [body(large, large, model=None, max_tokens=4)] * 20))
        light = list(pool.map(send, [body(small, model=None, max_tokens=4)] * 100))
    assert set(heavy) <= {200, 429} and set(light) <= {200, 429} and 200 in light
    end = time.monotonic() + 30
    # What stays, however many bursts there are: kept features and prompts, and the buffers of the threads that ran.
    while resident() - quiet > 200 and time.monotonic() < end:
        time.sleep(1)
    assert resident() - quiet < 200, f"{quiet:.0f} MB quiet, {resident():.0f} MB after"
