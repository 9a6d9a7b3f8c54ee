"""What this server serves: an engine for each model's name. Names may come, go and change their checkpoint while it runs."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.llava import return_freed_memory
from server.errors import LastModel, Overloaded, ShuttingDown, UnknownModel
from server.metrics import ServerMetrics

if TYPE_CHECKING:
    from server.engine import Engine

log = logging.getLogger("espalier")

FREEZES = 5
"""Further tries, at most, to collect an engine that somebody held for a moment."""

Build = Callable[[str | None, str, int], "Engine"]
"""A model's name and its checkpoint (a directory, or a shipped one's name) to an engine that is not yet started; the number
says how many bytes other engines' caches may still take."""


@dataclass(frozen=True)
class Picked:
    """The engine that a request's `model` means, that model as the client wrote it, and the level in it."""

    engine: Engine
    name: str
    level: str | None


class Served:
    """Engines by the name of their model; the first is for requests that name none. Each has a thread of its own.

    A swap builds the new engine beside the old one, gives it the name, and lets the old one end what it has accepted.
    """

    def __init__(self, engines: Iterable[Engine], build: Build | None = None) -> None:
        self.engines = {engine.model_name: engine for engine in engines}  # replaced as a whole: readers take no lock
        self.metrics = ServerMetrics()
        for name, engine in self.engines.items():
            self.metrics.add(name, engine.metrics)
        self._build = build
        self._retiring: list[Engine] = []
        self._changing = threading.Lock()
        self._draining = False

    # ---- names

    @property
    def first(self) -> Engine:
        return next(iter(self.engines.values()))

    def names(self) -> dict[str, tuple[Engine, str]]:
        """Every name that a request may give, its engine, and the level that it means."""
        found: dict[str, tuple[Engine, str]] = {}
        for name, engine in self.engines.items():
            found |= {name: (engine, engine.default_level), **{f"{name}@{level}": (engine, level) for level in engine.menu}}
        return found

    def pick(self, asked: str | None) -> Picked:
        """Who answers for `name` or `name@level`. Raises UnknownModel; a level that is not on the menu is found out later."""
        engines = self.engines
        if asked is None:
            name, engine = next(iter(engines.items()))
            return Picked(engine, name, None)
        if asked in engines:
            return Picked(engines[asked], asked, None)
        name, _, level = asked.rpartition("@")
        if name not in engines:
            raise self.unknown(asked)
        return Picked(engines[name], asked, level)

    def serves(self, engine: Engine) -> bool:
        """Whether an engine still has its name: one that was swapped refuses what comes too late for it."""
        return engine in self.engines.values()

    def check_room(self) -> None:
        """Raises Overloaded where every model would refuse."""
        refused: Overloaded | None = None
        for engine in self.engines.values():
            try:
                return engine.check_room()
            except Overloaded as error:
                refused = error
        assert refused
        raise refused

    def unknown(self, asked: str) -> UnknownModel:
        return UnknownModel(f"The model {asked[:100]!r} does not exist. This server has: {', '.join(self.names())}.", param="model")

    # ---- changes, one at a time

    def put(self, name: str, checkpoint: str) -> Engine:
        """Load a checkpoint and give it a name, which another may have had; that one ends its answers and is freed.

        Raises CheckpointError and ValueError for what cannot be served, and ShuttingDown.
        """
        assert self._build
        with self._changing:
            promised = sum(one.promised_bytes for one in self._all())
            engine = self._build(name, checkpoint, promised)
            if self._draining:
                raise ShuttingDown("the server is shutting down")
            engine.start()
            self.metrics.add(name, engine.metrics)
            old = [self.engines[name]] if name in self.engines else []
            self.engines = {**self.engines, name: engine}
            if self._draining:  # by now: `drain` has not seen this one
                engine.drain()
            log.info("serving %s, levels %s", name, ", ".join(engine.menu))
            if old:
                self._retire(old)
        return engine

    def remove(self, name: str) -> None:
        """Take a name away; its engine ends its answers and is freed. Raises UnknownModel, and LastModel for the only one."""
        with self._changing:
            if name not in self.engines:
                raise self.unknown(name)
            if len(self.engines) == 1:
                raise LastModel(f"{name} is the only model here; load another one first, or stop the server.")
            old = [self.engines[name]]
            self.engines = {other: engine for other, engine in self.engines.items() if other != name}
            self._retire(old)

    def _retire(self, old: list[Engine]) -> None:
        self._retiring += old
        threading.Thread(target=self._free, args=(old,), name="espalier-retire", daemon=True).start()

    def _free(self, old: list[Engine]) -> None:
        """The list gives its one engine away: who called still holds the list, and nobody may hold what is freed."""
        engine = old.pop()
        engine.stop(None)
        self.metrics.end(engine.model_name, engine.metrics)
        self._retiring.remove(engine)
        log.info("freed %s, checkpoint %s", engine.model_name, engine.fingerprint)
        still_held = weakref.ref(engine)
        del engine
        self.freeze()
        for _ in range(FREEZES):
            if still_held() is None:
                break
            time.sleep(1.0)  # who scrapes at this moment holds it, and what is frozen is never looked at again
            self.freeze()
        return_freed_memory()

    @staticmethod
    def freeze() -> None:
        """Collect garbage, and look no more at what is left: libraries and models are so many objects that to go through them would
        hold the interpreter for tenths of a second."""
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    # ---- all engines as one, for probes, watchdog and shutdown

    def _all(self) -> list[Engine]:
        """Those that end their answers too."""
        return [*self.engines.values(), *self._retiring]

    @property
    def alive(self) -> bool:
        return all(engine.alive for engine in self.engines.values())

    @property
    def ready(self) -> bool:
        return all(engine.ready for engine in self.engines.values())

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits."""
        return all(engine.idle for engine in self._all())

    @property
    def hung_seconds(self) -> float:
        """The longest of any pass that counts as hung, of engines that end their answers too."""
        return max(engine.hung_seconds for engine in self._all())

    def start(self) -> None:
        for engine in self.engines.values():
            engine.start()

    def drain(self) -> None:
        """Refuse new requests and models from now on. Safe in a signal handler."""
        self._draining = True
        for engine in self.engines.values():
            engine.drain()

    def give_up(self, message: str) -> None:
        """Fail all requests, for when an engine cannot."""
        self._draining = True
        for engine in self._all():
            engine.give_up(message)

    def stop(self, grace: float) -> bool:
        """Drain, let requests of all engines end for up to `grace` seconds in sum, fail the rest. True if nothing was cut short."""
        self.drain()
        deadline = time.monotonic() + grace
        ended = [engine.stop(max(0.0, deadline - time.monotonic())) for engine in self._all()]
        return all(ended)
