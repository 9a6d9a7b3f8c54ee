"""Ray Serve on a local cluster of two replicas: spread, caches, levels, streams, a killed replica, a redeploy, Ctrl-C."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from checkpoints.world import draw
from tests.deploy.live import ROOT, free_port, wait_for

pytest.importorskip("grpc", reason="needs the extra ray")
from deploy.ray_serve import Call, addressed

pytestmark = pytest.mark.slow
SCRIPT = ROOT / "deploy/ray_serve.py"
PATHS = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}


class Cluster:
    def __init__(self, running: subprocess.Popen[bytes], url: str) -> None:
        self.running, self.url, self.port = running, url, url.rpartition(":")[2]
        self.client = httpx.Client(base_url=url, timeout=60)

    def ask(self, picture: int, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
        return self.client.post(path, json=question(picture) | fields)

    def metrics(self) -> str:
        return self.client.get("/metrics").text

    def by_replica(self, metric: str, label: str = "") -> dict[str, float]:
        """The sum by replica of a metric's samples that have the label."""
        found: dict[str, float] = {}
        sample = rf'^espalier_{metric}{{(?=.*{label}).*replica="(\w+)".*}} (\S+)$'
        for replica, value in re.findall(sample, self.metrics(), re.MULTILINE):
            found[replica] = found.get(replica, 0.0) + float(value)
        return found

    def pids(self) -> list[int]:
        """Processes of replicas, among those that this cluster started."""
        return [pid for pid, title in descendants(self.running.pid) if title.startswith("ray::ServeReplica:espalier:replica")]


def question(picture: int) -> dict[str, Any]:
    file = io.BytesIO()
    draw("validation", picture).image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "How many objects are there?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8}


def descendants(parent: int) -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(") ")[2].split()[1]) == parent:
                yield int(path.name), (path / "cmdline").read_text().split("\0")[0]
                yield from descendants(int(path.name))
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    port = free_port()
    command = [sys.executable, SCRIPT, "embedded", "--replicas", "2", "--port", str(port)]
    running = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    cluster = Cluster(running, f"http://127.0.0.1:{port}")
    try:
        wait_for(lambda: cluster.client.get("/ready").status_code == 200, running, 180)
        wait_for(lambda: len(cluster.by_replica("build_info")) == 2, running)
        yield cluster
    finally:
        left = [pid for pid, _ in descendants(running.pid)]
        running.send_signal(signal.SIGINT)
        code = running.wait(timeout=120)
        cluster.client.close()
    assert code == 0, "Ctrl-C is a clean end"
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))


def test_load_spreads_and_a_picture_keeps_its_replica(cluster: Cluster) -> None:
    for _ in range(3):
        for picture in range(12):
            assert cluster.ask(picture).status_code == 200
    asked, hits = (cluster.by_replica(f"cache_{what}_total", 'cache="image"') for what in ("queries", "hits"))
    assert len(asked) == 2 and min(asked.values()) >= 3
    assert (sum(asked.values()), sum(hits.values())) == (36, 24), "each picture was encoded once"


def test_levels_are_routes_and_streams_stream(cluster: Cluster) -> None:
    payload = question(0) | {"stream": True, "max_tokens": 150, "ignore_eos": True}
    with cluster.client.stream("POST", "/strong/v1/chat/completions", json=payload) as reply:
        assert reply.headers["x-pruning-level"] == "strong"
        pieces = list(reply.iter_raw())
    events = [line[6:] for line in b"".join(pieces).decode().splitlines() if line.startswith("data: {")]
    assert [event["pruning"]["level"] for event in map(json.loads, events) if event.get("pruning")] == ["strong"]
    assert len(pieces) > 3, "what a proxy holds back comes in one or two reads"


def test_errors_and_the_playground_come_through(cluster: Cluster) -> None:
    assert cluster.ask(0, pruning={"level": "none"}).json()["error"]["code"] == "unknown_pruning_level"
    assert cluster.ask(0, "/nowhere/v1/chat/completions").json()["error"]["code"] == "unknown_pruning_level"
    assert "text/html" in cluster.client.get("/").headers["content-type"]


def test_who_hangs_up_frees_the_replica(cluster: Cluster) -> None:
    payload = question(0) | {"stream": True, "max_tokens": 600, "ignore_eos": True}
    with cluster.client.stream("POST", "/v1/chat/completions", json=payload) as reply:
        next(reply.iter_lines())
    wait_for(lambda: sum(cluster.by_replica("requests_running").values()) == 0, seconds=20)
    assert 'outcome="abort"' in "".join(line for line in cluster.metrics().splitlines() if line.endswith(" 1.0"))


def test_a_killed_replica_loses_nothing_that_had_not_begun(cluster: Cluster) -> None:
    victim, *_ = before = cluster.pids()
    assert len(before) == 2
    with ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(cluster.ask, picture) for picture in range(60)]
        while sum(reply.done() for reply in replies) < 10:
            time.sleep(0.02)
        os.kill(victim, signal.SIGKILL)
        assert [reply.result().status_code for reply in replies] == [200] * 60
    wait_for(lambda: len(cluster.by_replica("build_info")) == 2 and victim not in cluster.pids(), seconds=120)


def test_a_redeploy_drops_nothing(cluster: Cluster) -> None:
    codes: list[int] = []
    done = threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            codes.append(cluster.ask(len(codes) % 12).status_code)

    asker = threading.Thread(target=keep_asking)
    asker.start()
    try:
        command = [sys.executable, SCRIPT, "embedded", "--replicas", "2", "--port", cluster.port, "--address", "auto"]
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT | {"ESPALIER_DEFAULT_LEVEL": "strong"}, check=True, timeout=500)
        wait_for(lambda: cluster.ask(0).headers["x-pruning-level"] == "strong", seconds=120)
    finally:
        done.set()
        asker.join()
    assert len(codes) > 5 and set(codes) == {200}


# ---- without a cluster


def test_the_key_is_the_pictures_alone() -> None:
    def key(body: bytes) -> bytes:
        return addressed(Call("POST", "/v1/vqa", b"", [], body)).key

    first, again, other = (json.dumps(question(picture) | {"n": n}).encode() for picture, n in ((0, 1), (0, 2), (1, 1)))
    assert key(first) == key(again) != key(other)
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n--x--\r\n'
    assert key(form % b"\x89PNG one") == key(form % b"\x89PNG one") != key(form % b"\x89PNG two")
    assert key(b'{"question": "none"}') == b""


def test_a_level_in_the_path_becomes_a_header() -> None:
    call = addressed(Call("POST", "/strong/v1/vqa", b"", [], b""))
    assert (call.path, call.headers) == ("/v1/vqa", [(b"x-pruning-level", b"strong")])
    call = addressed(Call("POST", "/strong/v1/vqa", b"", [(b"x-pruning-level", b"off")], b""))
    assert call.headers == [(b"x-pruning-level", b"off")]
    assert addressed(Call("POST", "/v1/vqa", b"", [], b"")).headers == []
