"""Several models in one server: who answers for which name, and names that come, go and change their checkpoint."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from server import memory
from server.access import read_keys
from server.app import create_app
from server.engine import Engine
from server.errors import ShuttingDown, UnknownModel
from server.memory import OutOfMemory, check_room, free_bytes
from server.request import Event
from server.run import build_served
from server.served import Served
from server.settings import Settings, read_settings
from tests.server.client import ask, body, check_error, connect, events, image_part
from tests.server.fake_engine import FakeEngine
from tests.server.tiny import Reader, new_engine, submit, write
from tests.server.tiny import ask as ask_engine
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint

pytestmark = pytest.mark.anyio
ADMIN, USER = {"Authorization": "Bearer sk-admin"}, {"Authorization": "Bearer sk-user"}


class Stoppable(FakeEngine):
    """It refuses when it drains, and can be stopped, once its requests have ended."""

    def __init__(self, name: str, fingerprint: str = "fp_fake") -> None:
        super().__init__()
        self.model_name, self.fingerprint = name, fingerprint
        self.draining, self.stopped, self.hung_seconds = False, threading.Event(), 0.0

    def start(self) -> None:
        pass

    def submit(self, *requests: Any) -> None:
        if self.draining:
            raise ShuttingDown("the server is shutting down")
        super().submit(*requests)

    def drain(self) -> None:
        self.draining = True

    def stop(self, grace: float | None) -> bool:
        self.drain()
        while self._running:
            self.release.wait(0.01)
        self.stopped.set()
        return True


@pytest.fixture
def first() -> Stoppable:
    return Stoppable("first", "fp_1")


@pytest.fixture
def served(first: Stoppable) -> Served:
    def build(name: str | None, checkpoint: str, promised: int) -> Any:
        if checkpoint == "broken":
            raise CheckpointError("/secret/place/config.json is missing")
        if checkpoint == "large":
            raise OutOfMemory("it needs 7.00 GB and 1.00 GB are free")
        return Stoppable(name or checkpoint, f"fp_{checkpoint}")

    return Served([first, Stoppable("second", "fp_2")], build)


@pytest.fixture
def admin(served: Served, tmp_path: Path) -> httpx.AsyncClient:
    """A client of an app that knows an admin's key and a user's."""
    digests = [sha256(key.encode()).hexdigest() for key in ("sk-admin", "sk-user")]
    keys = tmp_path / "keys.toml"
    keys.write_text('[keys.admin]\nsha256 = "{}"\nadmin = true\n[keys.user]\nsha256 = "{}"\n'.format(*digests))
    settings = Settings(api_key_file=keys)
    transport = httpx.ASGITransport(create_app(served, settings, read_keys(settings)))
    return httpx.AsyncClient(transport=transport, base_url="http://espalier")


async def fingerprint(client: httpx.AsyncClient, model: str | None) -> str:
    reply = await ask(client, body(image_part(), model=model), headers=USER)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["pruning"]["checkpoint"])


# ---- who answers


@pytest.mark.parametrize(
    ("asked", "name", "level"),
    [
        (None, "org/llava@v2", None),
        ("org/llava@v2", "org/llava@v2", None),
        ("org/llava@v2@strong", "org/llava@v2@strong", "strong"),
        ("org/llava@v2@typo", "org/llava@v2@typo", "typo"),
    ],
)
def test_a_model_may_carry_a_level(asked: str | None, name: str, level: str | None) -> None:
    picked = Served([Stoppable("org/llava@v2"), Stoppable("other")]).pick(asked)
    assert (picked.engine.model_name, picked.name, picked.level) == ("org/llava@v2", name, level)


@pytest.mark.parametrize("asked", ["", "gpt-4o", "org/llava", "org/llava@v3@", "@strong", "gpt-4o@strong"])
def test_another_model_is_unknown(asked: str) -> None:
    served = Served([Stoppable("org/llava@v2"), Stoppable("other")])
    with pytest.raises(UnknownModel, match=r"org/llava@v2@strong.*other@off"):
        served.pick(asked)


async def test_each_model_answers_for_its_name() -> None:
    async with connect(Stoppable("first", "fp_1"), Stoppable("second", "fp_2")) as client:
        for model, expected in ((None, "fp_1"), ("first", "fp_1"), ("second", "fp_2"), ("second@strong", "fp_2")):
            assert await fingerprint(client, model) == expected
        assert check_error(await ask(client, body(model="third")), 404)["code"] == "model_not_found"
        listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        assert {"first", "first@strong", "second", "second@off"} <= set(listed)
        assert (await client.get("/v1/models/second@strong")).json()["pruning"]["level"] == "strong"
        assert (await client.get("/v1/pruning/levels?model=second")).status_code == 200
        assert check_error(await client.get("/v1/pruning/levels?model=third"), 404)
        assert (await client.get("/version")).json()["models"] == {"first": "fp_1", "second": "fp_2"}


async def test_a_level_of_another_model_is_refused() -> None:
    small = Stoppable("small")
    del small.menu["strong"]
    async with connect(Stoppable("large"), small) as client:
        assert (await ask(client, body(image_part(), model="large@strong"))).status_code == 200
        assert check_error(await ask(client, body(image_part(), model="small@strong")), 400)["code"] == "unknown_pruning_level"


async def test_a_key_without_a_level_of_the_model_may_not_ask(tmp_path: Path) -> None:
    small, keys = Stoppable("small"), tmp_path / "keys.toml"
    del small.menu["strong"]
    keys.write_text(f'[keys.a]\nsha256 = "{sha256(b"sk-user").hexdigest()}"\nlevels = ["strong"]')
    async with connect(Stoppable("large"), small, api_key_file=keys) as client:
        assert (await ask(client, body(image_part(), model="large"), headers=USER)).json()["pruning"]["level"] == "strong"
        refused = await ask(client, body(image_part(), model="small"), headers=USER)
        assert check_error(refused, 403)["code"] == "level_not_allowed"


async def test_one_engine_that_is_not_ready_is_a_server_that_is_not() -> None:
    engines = [Stoppable("first"), Stoppable("second")]
    async with connect(*engines) as client:
        assert (await client.get("/ready")).status_code == (await client.get("/live")).status_code == 200
        engines[1].ready = engines[1].alive = False
        assert (await client.get("/ready")).status_code == (await client.get("/live")).status_code == 503


async def test_each_model_has_its_own_series() -> None:
    engines = [Stoppable("first"), Stoppable("second")]
    for engine, count in zip(engines, (1, 3), strict=True):
        engine.metrics.prompt_tokens.inc(count)
    async with connect(*engines) as client:
        page = (await client.get("/metrics")).text
    assert 'espalier_prompt_tokens_total{model_name="first"} 1.0' in page
    assert 'espalier_prompt_tokens_total{model_name="second"} 3.0' in page
    assert page.count("# TYPE espalier_prompt_tokens_total ") == 1
    assert page.count("\nprocess_resident_memory_bytes ") == 1


# ---- changes


async def test_changing_what_is_served_takes_an_admin_key(admin: httpx.AsyncClient) -> None:
    asked = {"name": "third", "checkpoint": "x"}
    check_error(await admin.post("/v1/admin/models", json=asked), 401)
    check_error(await admin.post("/v1/admin/models", json=asked, headers=USER), 403)
    check_error(await admin.delete("/v1/admin/models/second", headers=USER), 403)
    async with connect(FakeEngine()) as without_keys:
        error = check_error(await without_keys.post("/v1/admin/models", json=asked), 403)
        assert error["code"] == "admin_key_needed"


async def test_a_model_is_loaded_and_unloaded(admin: httpx.AsyncClient, served: Served) -> None:
    loaded = await admin.post("/v1/admin/models", json={"name": "org/third", "checkpoint": "x"}, headers=ADMIN)
    assert loaded.json() == {
        "id": "org/third", "object": "model", "swapped": False, "fingerprint": "fp_x",
        "levels": ["off", "light", "balanced", "strong"],
    }  # fmt: skip
    assert await fingerprint(admin, "org/third") == "fp_x"
    assert (await admin.delete("/v1/admin/models/org/third", headers=ADMIN)).json()["deleted"]
    check_error(await ask(admin, body(image_part(), model="org/third"), headers=USER), 404)
    check_error(await admin.delete("/v1/admin/models/org/third", headers=ADMIN), 404)
    await admin.delete("/v1/admin/models/first", headers=ADMIN)
    assert await fingerprint(admin, None) == "fp_2", "the next one is the first now"
    assert check_error(await admin.delete("/v1/admin/models/second", headers=ADMIN), 409)["code"] == "last_model"


@pytest.mark.parametrize("change", ["swap", "unload"])
async def test_a_stream_outlives_its_model(admin: httpx.AsyncClient, first: Stoppable, change: str) -> None:
    first.hold_after = 2
    streaming = asyncio.create_task(ask(admin, body(image_part(), model="first", stream=True), headers=USER))
    assert await asyncio.to_thread(first.has_submitted.wait, 30)
    if change == "swap":
        asked = {"name": "first", "checkpoint": "new"}
        assert (await admin.post("/v1/admin/models", json=asked, headers=ADMIN)).json()["swapped"]
        assert await fingerprint(admin, "first") == "fp_new"
    else:
        assert (await admin.delete("/v1/admin/models/first", headers=ADMIN)).status_code == 200
    assert not first.stopped.is_set()
    first.release.set()
    said = events((await streaming).text)
    assert said[-1]["choices"][0]["finish_reason"] == "stop" and said[-1]["pruning"]["checkpoint"] == "fp_1"
    assert await asyncio.to_thread(first.stopped.wait, 30)


async def test_what_is_read_during_a_swap_goes_to_the_new_one(admin: httpx.AsyncClient, first: Stoppable) -> None:
    first.preprocessor.may_finish.clear()
    asking = asyncio.create_task(ask(admin, body(image_part(), model="first"), headers=USER))
    assert await asyncio.to_thread(first.preprocessor.busy.wait, 30)
    await admin.post("/v1/admin/models", json={"name": "first", "checkpoint": "new"}, headers=ADMIN)
    assert await asyncio.to_thread(first.stopped.wait, 30)
    first.preprocessor.may_finish.set()
    assert (await asking).json()["pruning"]["checkpoint"] == "fp_new"


@pytest.mark.parametrize(
    ("checkpoint", "code", "word"),
    [("broken", "checkpoint_not_loaded", "log says why"), ("large", "out_of_memory", "7.00 GB and 1.00 GB")],
)
async def test_what_cannot_be_loaded_changes_nothing(admin: httpx.AsyncClient, checkpoint: str, code: str, word: str) -> None:
    response = await admin.post("/v1/admin/models", json={"name": "first", "checkpoint": checkpoint}, headers=ADMIN)
    error = check_error(response, 400)
    assert (error["code"], error["param"]) == (code, "checkpoint")
    assert word in error["message"] and "/secret" not in response.text
    assert await fingerprint(admin, "first") == "fp_1"


@pytest.mark.parametrize("name", ["", "a b", "a@off", "/a", "a/", "x" * 101])
async def test_a_name_that_is_none_is_refused(admin: httpx.AsyncClient, name: str) -> None:
    response = await admin.post("/v1/admin/models", json={"name": name, "checkpoint": "x"}, headers=ADMIN)
    assert check_error(response, 400)["param"] == "name"


async def test_a_server_that_drains_takes_no_model(served: Served, first: Stoppable) -> None:
    served.drain()
    with pytest.raises(ShuttingDown):
        served.put("third", "x")
    assert served.stop(5) and first.stopped.is_set()


def test_an_engine_that_retires_is_watched(served: Served, first: Stoppable) -> None:
    first.hold_after = 0
    first._running.add("somebody")
    served.put("first", "new")
    first.hung_seconds = 3.0
    assert served.hung_seconds == 3.0 and served.alive
    first._running.clear()
    assert first.stopped.wait(30)


async def test_others_are_answered_while_a_model_loads(admin: httpx.AsyncClient, served: Served) -> None:
    built, build = threading.Event(), served._build
    served._build = lambda *asked: (built.wait(30), build(*asked))[1]
    loading = asyncio.create_task(admin.post("/v1/admin/models", json={"name": "third", "checkpoint": "x"}, headers=ADMIN))
    await asyncio.sleep(0.05)
    unloading = asyncio.create_task(admin.delete("/v1/admin/models/second", headers=ADMIN))
    await asyncio.sleep(0.05)
    assert not unloading.done()
    assert (await admin.get("/live")).status_code == 200
    built.set()
    assert (await loading).status_code == (await unloading).status_code == 200


@pytest.mark.parametrize("held", [False, True])
def test_an_engine_that_was_swapped_is_freed(served: Served, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though objects within it point to each other, and somebody may have `held` it when garbage was collected."""
    collected, freeze = threading.Event(), Served.freeze
    monkeypatch.setattr(Served, "freeze", lambda self: (freeze(), collected.set()))
    served.put("third", "x")
    served.engines["third"].itself = served.engines["third"]
    old, holders = weakref.ref(served.engines["third"]), [served.engines["third"]] * held
    served.put("third", "y")
    assert collected.wait(30)
    holders.clear()
    deadline = time.monotonic() + 30
    while old() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert old() is None


# ---- their metrics


class Held(Reader):
    """It stops the engine's thread at its first event, until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self.may_go_on = threading.Event(), threading.Event()

    def __call__(self, event: Event) -> None:
        self.began.set()
        assert self.may_go_on.wait(30)
        super().__call__(event)


@pytest.fixture
def swappable(tiny: Checkpoint) -> Iterator[Served]:
    """One model, a, that has answered with 3 tokens."""
    served = Served([new_engine(tiny, name="a")], lambda name, checkpoint, promised: new_engine(tiny, name=name))
    served.start()
    _, reader = submit(served.first, max_tokens=3)
    reader.wait()
    yield served
    served.stop(5)


def hold(engine: Engine) -> Held:
    """A request for 5 tokens that has begun."""
    held = Held()
    engine.submit(replace(ask_engine(engine, max_tokens=5), emit=held))
    assert held.began.wait(30)
    return held


def told(served: Served, name: str, model: str = "a") -> float | None:
    samples = [one for family in served.metrics.collect() for one in family.samples]
    found = [one.value for one in samples if one.name == f"espalier_{name}" and one.labels["model_name"] == model]
    return sum(found) if found else None


def wait_until_freed(served: Served) -> None:
    deadline = time.monotonic() + 30
    while served._retiring and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_swap_loses_no_count(swappable: Served) -> None:
    """Counters never fall, and what a retiring engine runs is seen."""
    held = hold(swappable.first)
    swappable.put("a", "new")
    assert (told(swappable, "requests_running"), told(swappable, "generated_tokens_total")) == (1, 3)
    assert told(swappable, "build_info") == 1 and swappable.first.scheduler.idle
    assert told(swappable, "kv_cache_usage_ratio") == 0, "that of the engine that new requests go to"
    _, reader = submit(swappable.first, max_tokens=3)
    reader.wait()
    held.may_go_on.set()
    wait_until_freed(swappable)
    assert (told(swappable, "requests_running"), told(swappable, "generated_tokens_total")) == (0, 11)
    assert told(swappable, "requests_total") == told(swappable, "time_to_first_token_seconds_count") == 3
    swappable.put("a", "newer")
    wait_until_freed(swappable)
    assert told(swappable, "requests_total") == 3 and told(swappable, "build_info") == 1


def test_an_unloaded_model_is_told_until_it_has_ended(swappable: Served) -> None:
    swappable.put("b", "new")
    held = hold(swappable.engines["a"])
    swappable.remove("a")
    assert (told(swappable, "requests_running"), told(swappable, "requests_total")) == (1, 1)
    held.may_go_on.set()
    wait_until_freed(swappable)
    assert told(swappable, "requests_running") is None and told(swappable, "requests_total", "b") == 0
    swappable.put("a", "again")
    assert told(swappable, "requests_total") == 0


# ---- from settings, with weights


def test_settings_name_what_is_served() -> None:
    assert Settings().checkpoints() == [(None, "embedded")]
    assert Settings(model=("a=x", "org/b=y=z")).checkpoints() == [("a", "x"), ("org/b", "y=z")]
    assert Settings(checkpoint="embedded", model=("a=x",)).checkpoints() == [(None, "embedded"), ("a", "x")]
    for wrong in ("a", "=x", "a@off=x", "a="):
        with pytest.raises(ValueError, match="model"):
            read_settings({"model": (wrong,)})


def test_two_checkpoints_in_one_server(tmp_path: Path) -> None:
    directory = write(tmp_path / "tiny")
    served = build_served(Settings(model=(f"a={directory}", f"b={directory}"), kv_tokens=200))
    assert list(served.engines) == ["a", "b"]
    a, b = served.engines.values()
    assert a.model is not b.model and a.promised_bytes > 0
    with pytest.raises(ValueError, match="two models are named a"):
        build_served(Settings(model=(f"a={directory}", f"a={directory}"), kv_tokens=200))


def test_what_does_not_fit_is_refused_with_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write(tmp_path / "tiny")
    check_room(directory, "cpu", "auto", kv_tokens=1000, promised=0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 10**9)
    with pytest.raises(OutOfMemory, match=r"0\.00 GB for weights and 57.60 GB for its KV cache, and 2\.00 GB are free"):
        check_room(directory, "cpu", "float32", kv_tokens=10**8, promised=10**9)


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_cgroup_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    host = free_bytes("cpu")
    assert host > 2**20
    group = tmp_path / ("pod" if version == 2 else "memory/pod")
    group.mkdir(parents=True)
    limit, usage, cached = (
        ("memory.max", "memory.current", "inactive_file") if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )  # fmt: skip
    for name, text in ((limit, "1000000"), (usage, "600000"), ("memory.stat", f"anon 5\n{cached} 100000")):
        (group / name).write_text(text)
    membership = tmp_path / "membership"
    membership.write_text("0::/pod/app\n" if version == 2 else "4:memory:/pod/app\n3:cpu:/x\n0::/\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "MEMBERSHIP", membership)
    assert free_bytes("cpu") == 500_000
    (group / limit).write_text("max" if version == 2 else str(2**62))
    assert free_bytes("cpu") > 2**20
