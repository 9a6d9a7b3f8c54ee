"""An engine that hangs or dies: the probes tell within seconds, clients are told, and the process ends by itself."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from server.run import Watchdog
from tests.server.client import body, image_part
from tests.server.scripted import scripted_server
from tests.server.tiny import write

SERVE = """
import sys, threading
from server import batch, engine, run
from server.settings import Settings

fault, asked = sys.argv[2], []
engine.HUNG_S = 0.5
pass_over = engine.Engine.step

def step(self):
    asked.append(1)
    if len(asked) > 20 and fault == "dies":
        raise MemoryError("the engine itself")
    pass_over(self)

def forward(*args, **kwargs):
    if len(asked) > 20:
        threading.Event().wait()
    return real(*args, **kwargs)

real, engine.Engine.step = batch.forward, step
if fault == "hangs":
    batch.forward = forward
run.run(Settings(checkpoint=sys.argv[1], port=0, hang_exit_s=2, shutdown_grace_s=5))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("watched") / "tiny-llava")


@pytest.fixture
def server(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with scripted_server(SERVE, checkpoint, request.param) as serving:
        yield serving


def ask(url: str, max_tokens: int) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json=body(image_part(), model=None, max_tokens=max_tokens), timeout=60)


@pytest.mark.parametrize("server", ["hangs"], indirect=True)
def test_a_pass_that_hangs_ends_the_process(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    assert ask(url, 4).status_code == 200
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(ask(url, 400)))
    asking.start()
    deadline = time.monotonic() + 30
    while httpx.get(f"{url}/ready").status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert httpx.get(f"{url}/live").status_code == 200
    assert process.wait(60) == 70
    asking.join(60)
    assert answers[0].status_code == 500
    assert "can be sent again" in answers[0].json()["error"]["message"]


@pytest.mark.parametrize("server", ["dies"], indirect=True)
def test_an_engine_that_dies_ends_the_process(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    assert ask(url, 4).status_code == 200
    assert ask(url, 400).status_code in (500, 503)
    assert process.wait(60) == 70


def test_a_process_that_was_stopped_has_not_hung() -> None:
    """After a pause the clock says an hour, and the pass goes on."""
    hung = iter([0.0, 3600.0, 0.0, 0.0])
    server = SimpleNamespace(should_exit=False)

    class Served:
        alive, idle = True, False

        @property
        def hung_seconds(self) -> float:
            for seconds in hung:
                return seconds
            server.should_exit = True
            return 0.0

    watchdog = Watchdog(Served(), server, limit_s=1)  # type: ignore[arg-type]
    watchdog.run()
    assert not watchdog.failed
