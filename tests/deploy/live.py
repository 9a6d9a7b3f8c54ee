"""A server under load and a real Prometheus that scrapes it by the shipped configuration and rules."""

from __future__ import annotations

import base64
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LEVELS = ("off", "light", "balanced", "strong", "auto")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def process(*command: str, ready: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs until the block ends, entered once `ready` answers 200."""
    running = subprocess.Popen(command, **options)
    try:
        wait_for(lambda: running.poll() is None and httpx.get(ready).status_code == 200, running)
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(timeout=60)


def wait_for(true: Any, running: subprocess.Popen[bytes] | None = None, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if true():
                return
        except httpx.TransportError:
            pass
        assert running is None or running.poll() is None, "the program ended"
        time.sleep(0.1)
    raise AssertionError("it did not come to be in time")


@contextmanager
def server(*arguments: str, **options: Any) -> Iterator[str]:
    """`espalier serve`; its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = (sys.executable, "-m", "espalier", "serve", "--port", str(port), *arguments)
    with process(*command, ready=f"{url}/ready", **{"cwd": ROOT, **options}):
        yield url


def questions(url: str, until: threading.Event) -> None:
    """Ask at every level, several choices and streams among them, the same few pictures again and again, and wrongly too.

    All who ask rest at the same time, one second in four: then answers are checked.
    """
    pictures = [f"data:;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in (ROOT / "docs/samples").glob("*.png")]
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(10_000):
            if until.is_set():
                return
            time.sleep(max(0.0, 1 - time.monotonic() % 4))
            content = [{"type": "image_url", "image_url": {"url": pictures[number % len(pictures)]}},
                       {"type": "text", "text": "How many objects are there?"}]  # fmt: skip
            level = "none" if number % 11 == 2 else LEVELS[number % len(LEVELS)]
            body = {"messages": [{"role": "user", "content": content}], "pruning": {"level": level}, "max_tokens": 12}
            client.post("/v1/chat/completions", json=body | {"n": 1 + number % 2, "stream": number % 3 == 0})


class Prometheus:
    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url)

    def query(self, expression: str) -> list[dict[str, Any]]:
        reply = self._client.get("/api/v1/query", params={"query": expression}).json()
        assert reply["status"] == "success", f"{reply.get('error')}: {expression}"
        found: list[dict[str, Any]] = reply["data"]["result"]
        return found

    def close(self) -> None:
        self._client.close()


@contextmanager
def prometheus(target: str, directory: Path) -> Iterator[Prometheus]:
    """Debian's Prometheus by deploy/prometheus/, its intervals shortened and its target replaced."""
    shipped = ROOT / "deploy/prometheus"
    config = yaml.safe_load((shipped / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(shipped / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    # As the Prometheus operator would label a pod.
    labels = {"namespace": "espalier", "pod": "espalier-0"}
    job["static_configs"] = [{"targets": [target.removeprefix("http://")], "labels": labels}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address={url}", "--log.level=warn",
    ]  # fmt: skip
    with process(*command, ready=f"http://{url}/-/ready"):
        client = Prometheus(f"http://{url}")
        try:
            yield client
        finally:
            client.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Queries to a Prometheus that has watched a server for some seconds of load, and still does."""
    if not shutil.which("prometheus"):
        pytest.skip("needs prometheus")
    done = threading.Event()
    with server("--shadow", "1") as url, prometheus(url, tmp_path_factory.mktemp("prometheus")) as queries:
        askers = [threading.Thread(target=questions, args=(url, done)) for _ in range(3)]
        try:
            for asker in askers:
                asker.start()
            scraped = 'count(count_over_time(espalier_build_info{job="espalier"}[1m]) >= 8)'
            everything = "sum(espalier_rejections_total) >= 4 and count(sum by (level) (espalier_requests_total) > 1) >= 5"
            checked = "sum(espalier_shadow_compared_total) > 2"
            wait_for(lambda: queries.query(f"{scraped} and on () ({everything}) and on () ({checked})"))
            yield queries
        finally:
            done.set()
            for asker in askers:
                asker.join()
