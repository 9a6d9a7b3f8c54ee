"""Start a server: settings, weights, engine thread, HTTP; and stop it without cutting answers short."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from socket import socket
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from checkpoints.shipped import resolve
from models.checkpoint import check_device, load
from server.access import read_keys, warning
from server.app import create_app
from server.engine import Engine, Limits
from server.errors import ContextTooLong
from server.logs import configure
from server.memory import FreedMemory, check_room
from server.protocol import DeadlineProtocol
from server.served import Served
from server.settings import Settings

if TYPE_CHECKING:  # its package is an extra
    from server.tracing import Tracing

log = logging.getLogger("espalier")
WATCH_EVERY_S = 0.5
SWITCH_S = 0.0005
"""How long a thread keeps the interpreter's lock while another waits for it, a tenth of Python's own value: the event loop and the
engine ask for it many times a request and give it back soon, and who reads a large body does not."""
TELLING_S = 5
"""Seconds in which those whose answers are cut short are told; and then in which threads that read requests may end."""
SHORT = 16
"""Tokens of a short question, and of its answer."""
FAILED, CUT_SHORT = 70, 75
"""Exit status after a failure of the engine, EX_SOFTWARE, and after answers that the grace period cut short, EX_TEMPFAIL."""


class DrainingServer(uvicorn.Server):
    """Turns `/ready` to 503 at the signal, so that traffic goes elsewhere while running answers end. Those that have not ended when
    the grace period has are told so by the engines, each in its own form; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, served: Served, grace: float) -> None:
        super().__init__(config)
        self._served, self._grace = served, grace
        self.cut_short = False

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Tell where it serves once it does."""
        await super().startup(sockets=sockets)
        for server in self.servers if self.started else ():
            host, port, *_ = server.sockets[0].getsockname()
            for name, engine in self._served.engines.items():
                log.info("serving %s on http://%s:%d, levels %s", name, host, port, ", ".join(engine.menu))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._served.drain()
        grace = 0.0 if self.should_exit else self._grace
        super().handle_exit(sig, frame)
        threading.Thread(target=self._stop_engines, args=(grace,), name="espalier-drain", daemon=True).start()

    def _stop_engines(self, grace: float) -> None:
        last = time.monotonic() + grace + 2 * TELLING_S
        if not self._served.stop(grace):
            self.cut_short = True
            log.warning("answers were cut short at the end of the grace period")
        time.sleep(max(0.0, last - time.monotonic()))
        log.warning("a request is still being read: the process ends without it")  # Python would wait for its thread
        logging.shutdown()
        os._exit(CUT_SHORT)


class Watchdog(threading.Thread):
    """Ends the server when an engine's thread has ended by itself, or hangs for longer than `limit_s`; and gives memory back
    while nothing runs."""

    def __init__(self, served: Served, server: uvicorn.Server, limit_s: float) -> None:
        super().__init__(name="espalier-watchdog", daemon=True)
        self._served, self._server, self._limit_s = served, server, limit_s
        self.failed = False

    def run(self) -> None:
        freed = FreedMemory()
        seen = 0.0  # seconds watched: a process that was stopped, and this thread with it, has not hung
        while not self._server.should_exit:
            if not self._served.alive:
                return self._end("an engine's thread has ended")
            seen = seen + WATCH_EVERY_S if self._served.hung_seconds else 0.0
            if seen > self._limit_s:
                return self._end(f"a pass has hung for {self._limit_s:g} s")
            time.sleep(WATCH_EVERY_S)
            if self._served.idle:
                freed.give_back()
        return None

    def _end(self, reason: str) -> None:
        log.critical("%s: the process ends", reason)
        self.failed = True
        self._served.give_up("the server failed; the request can be sent again")
        self._server.should_exit = True


def run(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises SystemExit, not zero, when the engine has failed or answers were cut short."""
    configure(settings.log_format)
    sys.setswitchinterval(SWITCH_S)
    tracing = start_tracing(settings.otlp_endpoint) if settings.otlp_endpoint else None
    if settings.allow_image_hosts:
        check_fetching(settings.allow_image_hosts)
    keys = read_keys(settings)
    if told := warning(settings, keys):
        log.warning(told)
    served = build_served(settings, tracing)
    served.start()
    app = create_app(served, settings, keys)
    served.freeze()
    grace = settings.shutdown_grace_s
    # uvloop comes with other packages: what is tested is what runs.
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, loop="asyncio", http=DeadlineProtocol, log_level="warning", log_config=None,
        timeout_graceful_shutdown=grace + TELLING_S,
    )  # fmt: skip
    server = DrainingServer(config, served, grace)
    watchdog = Watchdog(served, server, settings.hang_exit_s)
    watchdog.start()
    # uvicorn raises the signal again once it has drained; the engine has yet to stop, and a clean end is exit status 0.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with suppress(KeyboardInterrupt):
            server.run()
    finally:
        served.stop(grace)
        if tracing:
            tracing.stop()
    if watchdog.failed:
        raise SystemExit(FAILED)
    if server.cut_short:
        raise SystemExit(CUT_SHORT)


def start_tracing(endpoint: str) -> Tracing:
    """Raises ValueError without the extra otel."""
    try:
        from server.tracing import Tracing
    except ImportError as error:
        raise ValueError("otlp_endpoint needs OpenTelemetry: pip install -e '.[otel]'") from error
    return Tracing.over_otlp(endpoint)


def check_fetching(hosts: Collection[str]) -> None:
    """Raises ValueError without the extra urls, and for what is no host's name."""
    try:
        from server.fetch import policy_for
    except ImportError as error:
        raise ValueError("allow_image_hosts needs httpx and ssrfguard: pip install -e '.[urls]'") from error
    policy_for(hosts)


def build_served(settings: Settings, tracing: Tracing | None = None) -> Served:
    """The engines of all checkpoints that the settings name, not yet started."""

    def build(name: str | None, checkpoint: str, promised: int) -> Engine:
        return build_engine(settings, name, checkpoint, promised, tracing)

    engines: dict[str, Engine] = {}
    for name, checkpoint in settings.checkpoints():
        engine = build(name, checkpoint, sum(one.promised_bytes for one in engines.values()))
        if engine.model_name in engines:
            raise ValueError(f"two models are named {engine.model_name}; give one another name: --model NAME={checkpoint}")
        engines[engine.model_name] = engine
    return Served(engines.values(), build)


def build_engine(
    settings: Settings, name: str | None, checkpoint: str, promised: int = 0, tracing: Tracing | None = None
) -> Engine:
    """An engine for a checkpoint, a directory or a shipped one's name. Raises OutOfMemory, before it takes any, where `promised`
    bytes for other engines' caches leave too little."""
    check_device(settings.device)
    directory = resolve(checkpoint)
    check_room(directory, settings.device, settings.dtype, settings.kv_tokens, promised)
    loaded = load(directory, settings.device, settings.dtype, settings.quantization)
    limits = Limits(
        max_running=settings.max_batch, max_waiting=settings.max_queue, max_wait_s=settings.max_queue_s,
        max_prefill=settings.max_prefill, kv_rows=settings.kv_tokens * loaded.model.num_layers, promised_bytes=promised,
    )  # fmt: skip
    log.info(
        "loaded %s (%.1f MB of weights, %s, %s)", loaded.directory, loaded.model.weight_bytes / 1e6,
        loaded.quantization or loaded.model.dtype, loaded.model.device,
    )  # fmt: skip
    engine = Engine(
        loaded, limits, default_level=settings.default_level, degrade=settings.degrade, token_policy=settings.token_policy,
        name=name, tracing=tracing, shadow=settings.shadow,
    )  # fmt: skip
    check_cache(engine)
    return engine


def check_cache(engine: Engine) -> None:
    """Raises ValueError for a KV cache that holds no short question about one picture."""
    side = engine.preprocessor.image_side
    layout = engine.preprocessor.layout(side, side)
    try:
        engine.reserve(engine.default_level, layout.visual_tokens + SHORT, [layout], SHORT)
    except ContextTooLong as error:
        raise ValueError(f"kv_tokens is too small for a question about one picture: {error.message}") from error
