"""Many machines by Ray Serve: replicas of the same app behind one address. Needs the extra `ray`.

    python deploy/ray_serve.py embedded --replicas 2

A front reads each request, takes its pictures' digest for a key, and hands it to a replica. The same picture goes to the same
replica, which has its features at hand; when that one is full, to the next in the key's own order. A replica that dies before it
has sent anything loses nothing: another one is asked.

Without `--address` it starts a cluster of its own and ends it at SIGTERM or Ctrl-C. With one it deploys there and returns; called
again with other settings, Ray Serve replaces the replicas one by one.
"""

from __future__ import annotations

import asyncio
import re
import signal
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Annotated, Any

import ray
import typer
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import AutoscalingConfig, HTTPOptions, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.settings import Settings, read_settings

PICTURES = re.compile(rb'base64,([^"]*)"|filename=.*?\r\n\r\n(.*?)\r\n--', re.DOTALL)
"""The pictures of a JSON body, and of a form."""
LEVEL_ROUTE = re.compile(r"/(\w+)(/v1/.*)")
TRIES = 3


@dataclass(frozen=True)
class Call:
    """An HTTP request, read to its end. `key` says which replica knows its pictures."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    key: bytes = b""


class PictureRouter(RequestRouter):
    """Prefers replicas by rendezvous hashing of a call's `key`; without one, whichever has the shortest queue. `place` asks for one
    by number."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        asked = pending_request.kwargs if pending_request and candidate_replicas else {}
        if "place" in asked:
            ordered = sorted(candidate_replicas, key=lambda one: one.replica_id.unique_id)
            return [[ordered[asked["place"] % len(ordered)]]]
        if not (key := asked.get("key")):
            return [candidate_replicas]
        ranked = sorted(candidate_replicas, key=lambda one: _digest(key, one.replica_id.unique_id.encode()))
        return [[one] for one in ranked]


def _digest(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


@serve.deployment(name="replica")
class Replica:
    """The engines and the app in front of them, as `espalier serve` has them, without a port of its own."""

    def __init__(self, given: dict[str, Any]) -> None:
        from server.access import read_keys
        from server.app import create_app  # torch, in the replica alone
        from server.logs import configure
        from server.run import build_served

        self._settings = read_settings(given)
        configure(self._settings.log_format)
        self._name = serve.get_replica_context().replica_tag
        self._served = build_served(self._settings)
        self._served.start()
        self._app = create_app(self._served, self._settings, read_keys(self._settings))

    def check_health(self) -> None:
        if not self._served.alive:
            raise RuntimeError("an engine's thread is gone")

    async def answer(self, call: Call, key: bytes) -> AsyncIterator[list[Message]]:
        """The app's ASGI messages, as many at once as there are; `key` was for the router."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.create_task(self._app(_scope(call), _receive_once(call.body), messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                ready = [message]
                while not messages.empty() and (more := messages.get_nowait()) is not None:
                    ready.append(more)
                yield ready
                if task.done() and messages.empty():
                    break
            await task
        finally:  # the caller may be gone
            task.cancel()

    async def metrics(self, place: int) -> tuple[str, str]:
        """This replica's name and its exposition; `place` was for the router."""
        return self._name, generate_latest(self._served.metrics).decode()

    async def __del__(self) -> None:
        await asyncio.to_thread(self._served.stop, self._settings.shutdown_grace_s)


def _scope(call: Call) -> Scope:
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": call.method, "path": call.path,
        "raw_path": call.path.encode(), "query_string": call.query, "headers": call.headers, "scheme": "http",
        "root_path": "", "server": None, "client": None,
    }  # fmt: skip


def _receive_once(body: bytes) -> Receive:
    """The body, and then silence: whoever hangs up cancels the task."""
    left = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return left.pop() if left else await asyncio.Future()

    return receive


@serve.deployment(name="front", max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Front:
    """What clients speak to."""

    def __init__(self, replicas: DeploymentHandle, max_body_bytes: int) -> None:
        self._replicas = replicas
        self._max_body_bytes = max_body_bytes

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:  # uvicorn takes a bound method for ASGI 2
            if scope["type"] == "http":
                await self._serve(scope, receive, send)

        return app

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"].rstrip("/") == "/metrics":
            await Response(await self._metrics(), media_type="text/plain; version=0.0.4")(scope, receive, send)
            return
        call = await _read(scope, receive, self._max_body_bytes)
        pumping = asyncio.create_task(self._pump(call, send))
        watching = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((pumping, watching), return_when=asyncio.FIRST_COMPLETED)
            if pumping.done():
                pumping.result()
        finally:
            pumping.cancel()
            watching.cancel()
            await asyncio.gather(pumping, watching, return_exceptions=True)

    async def _pump(self, call: Call, send: Send) -> None:
        """Send on what a replica answers; ask another one if it dies before it has said anything."""
        for left in reversed(range(TRIES)):
            started = False
            answer = self._replicas.options(stream=True).answer.remote(call, key=call.key)
            try:
                async for messages in answer:
                    started = True
                    for message in messages:
                        await send(message)
                return
            except RayActorError:
                if started or not left:
                    raise
            except asyncio.CancelledError:
                answer.cancel()
                raise

    async def _metrics(self) -> bytes:
        """All replicas' metrics, each sample with its replica's name. They are asked in turn until the first one answers again."""
        expositions: dict[str, str] = {}
        for place in range(1000):
            name, text = await self._replicas.metrics.remote(place=place)
            if name in expositions:
                break
            expositions[name] = text
        registry = CollectorRegistry()
        registry.register(Together(expositions))
        return generate_latest(registry)


class Together(Collector):
    """Several expositions as one, told apart by the label `replica`."""

    def __init__(self, expositions: dict[str, str]) -> None:
        self._expositions = expositions

    def collect(self) -> list[Metric]:
        families: dict[str, Metric] = {}
        for name, text in self._expositions.items():
            for family in text_string_to_metric_families(text):
                whole = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                whole.samples += [sample._replace(labels={**sample.labels, "replica": name}) for sample in family.samples]
        return list(families.values())


async def _read(scope: Scope, receive: Receive, most: int) -> Call:
    """The whole request. A body above the limit is read no further; the app refuses it by its own count."""
    body = bytearray()
    more = True
    while more and len(body) <= most:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False) and message["type"] == "http.request"
    return addressed(Call(scope["method"], scope["path"], scope["query_string"], list(scope["headers"]), bytes(body)))


def addressed(call: Call) -> Call:
    """With the key of its pictures. `/LEVEL/v1/…` is `/v1/…` at that level, unless a header says otherwise."""
    pictures = [json or form for json, form in PICTURES.findall(call.body)]
    path, headers = call.path, call.headers
    if route := LEVEL_ROUTE.fullmatch(path):
        level, path = route.groups()
        if not any(name == b"x-pruning-level" for name, _ in headers):
            headers = [*headers, (b"x-pruning-level", level.encode())]
    return replace(call, path=path, headers=headers, key=_digest(*pictures) if pictures else b"")


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def application(settings: Settings, least: int, most: int, cpus: float, gpus: float) -> serve.Application:
    """Between `least` and `most` replicas of `cpus` cores and `gpus` devices each, and their front."""
    replica = Replica.options(
        autoscaling_config=AutoscalingConfig(
            min_replicas=least, max_replicas=most, target_ongoing_requests=settings.max_batch, upscale_delay_s=5
        ),
        max_ongoing_requests=settings.max_batch + settings.max_queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(request_router_class=PictureRouter),
        graceful_shutdown_timeout_s=settings.shutdown_grace_s + 5,
        health_check_period_s=2,
    )  # fmt: skip
    return Front.bind(replica.bind(settings.model_dump(mode="json")), settings.max_body_bytes)


def main(
    checkpoint: Annotated[str, typer.Argument(help="A directory that every machine has, or a shipped checkpoint.")] = "embedded",
    replicas: Annotated[int, typer.Option(min=1, help="At least so many.")] = 1,
    max_replicas: Annotated[int | None, typer.Option(min=1, help="At most so many.", show_default="as --replicas")] = None,
    cpus: Annotated[float, typer.Option(min=0, help="Cores of each replica.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs of each replica.")] = 0,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster, or auto.", show_default="one of its own")] = None,
    host: Annotated[str, typer.Option(help=Settings.model_fields["host"].description)] = "127.0.0.1",
    port: Annotated[int, typer.Option(help=Settings.model_fields["port"].description)] = 8000,
) -> None:
    """Serve by Ray Serve. ESPALIER_* variables are the replicas' settings."""
    settings = read_settings({"checkpoint": checkpoint, "host": host, "port": port} | ({"device": "cuda"} if gpus else {}))
    ended = threading.Event()
    ray.init(address=address, include_dashboard=False, log_to_driver=False)
    for sign in (signal.SIGINT, signal.SIGTERM) if address is None else ():
        signal.signal(sign, lambda *_: ended.set())
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(application(settings, replicas, max_replicas or replicas, cpus, gpus), name="espalier")
        typer.echo(f"serving {checkpoint} on http://{host}:{port}")
        if address is None:
            ended.wait()
    finally:
        if address is None:
            serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    typer.run(main)
