"""Who may ask: keys with their levels and limits, hosts, and web pages; over an engine without a model, in process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from server.access import read_keys, warning
from server.settings import Settings
from tests.server.client import ask, body, check_error, connect, image_part
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
KEY, OTHER = "sk-one", "sk-two"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def key_file(folder: Path, **keys: str) -> Path:
    """A key file; each value is the key, and then further lines of its table."""
    path = folder / "keys.toml"
    tables = []
    for name, told in keys.items():
        key, *more = told.split(chr(10))
        tables.append(chr(10).join([f"[keys.{name}]", f'sha256 = "{sha256(key.encode()).hexdigest()}"', *more]))
    path.write_text(chr(10).join(tables))
    return path


@pytest.fixture
async def guarded() -> AsyncIterator[httpx.AsyncClient]:
    async with connect(FakeEngine(), api_keys=f"{KEY}, {OTHER}") as client:
        yield client


# ---- keys


async def test_every_documented_route_but_probes_needs_a_key(guarded: httpx.AsyncClient) -> None:
    async with connect(FakeEngine()) as open_client:
        document = (await open_client.get("/openapi.json")).json()
    refused = set()
    for path, methods in document["paths"].items():
        for method in methods:
            response = await guarded.request(method, path)
            if response.status_code == 401:
                check_error(response, 401)
                assert response.headers["www-authenticate"] == "Bearer"
                refused.add(path)
    assert document["paths"].keys() - refused == {"/live", "/ready", "/health"}
    assert (await guarded.get("/openapi.json")).status_code == 401
    assert (await guarded.get("/nowhere")).status_code == 401


@pytest.mark.parametrize("key", [KEY, OTHER])
async def test_a_key_opens(guarded: httpx.AsyncClient, key: str) -> None:
    assert (await ask(guarded, headers=bearer(key))).status_code == 200


@pytest.mark.parametrize("header", ["Bearer sk-on", "Bearer ", "Basic sk-one", "sk-one", f"Bearer {KEY}x"])
async def test_another_key_does_not(guarded: httpx.AsyncClient, header: str) -> None:
    error = check_error(await ask(guarded, headers={"Authorization": header}), 401)
    assert error["code"] == "invalid_api_key"


async def test_the_page_can_be_opened_without_a_key(guarded: httpx.AsyncClient) -> None:
    for path in ("/", "/playground", "/playground/"):
        assert "Espalier" in (await guarded.get(path)).text
    assert (await guarded.get("/playground/app.js")).status_code == 200


async def test_metrics_are_open_by_choice(guarded: httpx.AsyncClient) -> None:
    assert (await guarded.get("/metrics")).status_code == 401
    async with connect(FakeEngine(), api_keys=KEY, open_metrics=True) as client:
        assert (await client.get("/metrics")).status_code == 200


async def test_a_key_may_ask_for_its_levels_alone(tmp_path: Path) -> None:
    keys = key_file(tmp_path, mobile=f'{KEY}\nlevels = ["strong", "balanced"]')
    async with connect(FakeEngine(), api_key_file=keys) as client:
        reply = (await ask(client, headers=bearer(KEY))).json()
        assert reply["pruning"]["level"] == "strong", "its first is its default"
        hinted = await ask(client, body(image_part(detail="high")), headers=bearer(KEY))
        assert hinted.json()["pruning"]["level"] == "strong"
        for chosen in ({"model": "fake-llava@off"}, {"pruning": {"level": "off"}}):
            error = check_error(await ask(client, body(image_part(), **chosen), headers=bearer(KEY)), 403)
            assert error["code"] == "level_not_allowed"
            assert "strong, balanced" in error["message"]


async def test_a_key_is_held_to_its_requests_a_minute(tmp_path: Path) -> None:
    keys = key_file(tmp_path, slow=f"{KEY}\nrequests_per_minute = 2", fast=OTHER)
    async with connect(FakeEngine(), api_key_file=keys) as client:
        answers = [await ask(client, headers=bearer(KEY)) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert 0 < int(answers[2].headers["retry-after"]) <= 60
        assert check_error(answers[2], 429)["code"] == "rate_limit_exceeded"
        assert (await ask(client, headers=bearer(OTHER))).status_code == 200


async def test_a_key_is_held_to_its_requests_at_once(tmp_path: Path) -> None:
    keys = key_file(tmp_path, one=f"{KEY}\nconcurrent = 1")
    engine = FakeEngine()
    async with connect(engine, api_key_file=keys) as client:
        engine.preprocessor.may_finish.clear()
        first = asyncio.create_task(ask(client, headers=bearer(KEY)))
        await asyncio.to_thread(engine.preprocessor.busy.wait, 30)
        assert (await ask(client, headers=bearer(KEY))).status_code == 429
        engine.preprocessor.may_finish.set()
        assert (await first).status_code == 200
        assert (await ask(client, headers=bearer(KEY))).status_code == 200


async def test_keys_do_not_share_cached_pictures() -> None:
    engine = FakeEngine()
    async with connect(engine, api_keys=f"{KEY},{OTHER}") as client:
        for key in (KEY, KEY, OTHER):
            await ask(client, headers=bearer(key))
    first, again, other = (request.images[0].digest for request in engine.submitted)
    assert first == again != other


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "keys: Field required"),
        ("[keys.a]", "keys.a.sha256: Field required"),
        ('[keys.a]\nsha256 = "plain"', "keys.a.sha256"),
        (f'[keys.a]\nsha256 = "{"0" * 64}"\nlevel = "off"', "keys.a.level: Extra"),
        (f'[keys.a]\nsha256 = "{"0" * 64}"\n[keys.b]\nsha256 = "{"0" * 64}"', "given twice"),
        ("[keys", "keys.toml"),
    ],
)
async def test_a_key_file_that_is_wrong_is_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "keys.toml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_keys(Settings(api_key_file=tmp_path / "keys.toml"))


def test_two_keys_have_two_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="named 'key-1'"):
        read_keys(Settings(api_keys=OTHER, api_key_file=key_file(tmp_path, **{"key-1": KEY})))


async def test_a_key_with_an_unknown_level_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="API key a: level 'ligth' is not one of off, light"):
        connect(FakeEngine(), api_key_file=key_file(tmp_path, a=f'{KEY}\nlevels = ["ligth"]'))


def test_keys_are_not_shown() -> None:
    assert KEY not in repr(Settings(api_keys=KEY))


# ---- web pages and hosts


async def test_a_page_of_another_origin_may_not_ask() -> None:
    async with connect(FakeEngine()) as client:
        for origin in ("https://evil.example", "null"):
            response = await client.post("/v1/vqa", content="{}", headers={"Origin": origin, "Content-Type": "text/plain"})
            assert check_error(response, 403)["code"] == "origin_not_allowed"


async def test_a_name_that_leads_here_by_trickery_may_not_ask() -> None:
    """DNS rebinding: the page's own host and the Host header agree, but the server listens on loopback and has no such name."""
    async with connect(FakeEngine()) as client:
        response = await ask(client, headers={"Origin": "http://espalier"})
        assert check_error(response, 403)["code"] == "origin_not_allowed"


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000"])
async def test_its_own_page_may_ask(host: str) -> None:
    async with connect(FakeEngine()) as client:
        assert (await ask(client, headers={"Origin": f"http://{host}", "Host": host})).status_code == 200
        plain = {"Origin": f"http://{host}", "Host": host, "Content-Type": "text/plain"}
        assert check_error(await client.post("/v1/vqa", content="{}", headers=plain), 415)


async def test_an_allowed_origin_may_ask_and_read() -> None:
    origin = "https://app.example.com"
    async with connect(FakeEngine(), cors_origins=(origin,)) as client:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        before = await client.options("/v1/chat/completions", headers=asked)
        assert before.headers["access-control-allow-origin"] == origin
        response = await ask(client, headers={"Origin": origin})
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin
        assert (await ask(client, headers={"Origin": "https://evil.example"})).status_code == 403


async def test_an_origin_may_be_an_address() -> None:
    origin = "http://[::1]:3000"
    async with connect(FakeEngine(), cors_origins=(origin,)) as client:
        assert (await ask(client, headers={"Origin": origin})).status_code == 200
        assert (await ask(client, headers={"Origin": "http://1:3000"})).status_code == 403


@pytest.mark.parametrize("headers", [{"Host": "["}, {"Origin": "http://["}, {"Host": "[", "Origin": "http://["}])
async def test_a_host_that_is_none_is_no_fault_of_ours(headers: dict[str, str]) -> None:
    async with connect(FakeEngine()) as client:
        assert (await ask(client, headers=headers)).status_code == (403 if "Origin" in headers else 200)


async def test_other_hosts_are_refused_where_hosts_are_named() -> None:
    async with connect(FakeEngine(), allowed_hosts=("*.example.com",)) as client:
        assert check_error(await ask(client), 421)["code"] == "host_not_allowed"
        assert (await ask(client, headers={"Host": "vqa.example.com"})).status_code == 200
        assert (await client.get("/live")).status_code == 200, "probes come by address"


def test_an_open_server_says_so() -> None:
    assert "no API keys are set" in str(warning(Settings(host="0.0.0.0"), ()))
    assert warning(Settings(), ()) is None
    keys = read_keys(Settings(api_keys=KEY))
    assert warning(Settings(host="0.0.0.0"), keys) is None
