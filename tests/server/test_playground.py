"""The page at `/` and what it asks of the API: by HTTP always, in a browser where Chromium is installed."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from PIL import Image

from checkpoints.shipped import resolve
from models.checkpoint import load
from server.engine import Engine, Limits
from server.page import PLAYGROUND
from server.schemas import MAX_DETAIL_IMAGES
from tests.server.client import app_of, body, check_error, connect, events, image_part
from tests.server.fake_engine import FakeEngine, data_url

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "docs/samples"
CHROMIUM = shutil.which("chromium")
COUNT_ANSWERED = """
    const send = window.fetch;
    window.answered = [];
    window.fetch = (path, options) => {
        if (path.endsWith("completions")) window.answered.push(document.querySelectorAll(".ran:not([hidden])").length);
        return send(path, options);
    };
"""
"""Notes how many answers the page shows when it asks a question."""
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
).split()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The embedded checkpoint, whose router knows what to keep."""
    engine = Engine(load(resolve("embedded")), Limits(kv_rows=20_000))
    engine.start()
    yield engine
    engine.stop(0)


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(engine) as client:
        yield client


# ---- the files


@pytest.mark.anyio
async def test_the_page_loads_only_what_the_server_has() -> None:
    async with connect(FakeEngine()) as client:
        page = await client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        paths = re.findall(r'(?:src|href)="(playground/[^"]+)"', page.text)
        assert {"playground/app.js", "playground/style.css"} <= set(paths)
        for path in [*paths, *(f"playground/samples/{sample.name}" for sample in SAMPLES.iterdir())]:
            response = await client.get(path)
            assert response.status_code == 200, path
            policy = response.headers["content-security-policy"]
            assert policy == page.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "://" not in policy
        assert (await client.get("/playground/../settings.py")).status_code == 404
        check_error(await client.get("/playground/nothing.js"), 404)


def test_the_page_is_small_and_knows_no_other_host() -> None:
    files = [path for path in PLAYGROUND.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 150_000
    for path in files:
        text = path.read_text()
        assert set(re.findall(r"\bhttps?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}, path.name
        assert not re.search(r"\bon[a-z]+=\"|style=\"|javascript:|innerHTML|\beval\(", text), path.name
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert (PLAYGROUND / module).is_file(), f"{path.name} imports {module}"


def test_the_pages_samples_are_the_documented_ones() -> None:
    for sample in SAMPLES.iterdir():
        assert (PLAYGROUND / "samples" / sample.name).read_bytes() == sample.read_bytes(), sample.name


# ---- pruning.detail


def question(level: str, pictures: int = 1, **fields: Any) -> dict[str, Any]:
    shapes = image_part(data_url((SAMPLES / "shapes.png").read_bytes()))
    return body(*[shapes] * pictures, text="How many objects are there?", pruning={"level": level, "detail": True}, **fields) | {
        "model": None
    }


async def told(client: httpx.AsyncClient, level: str, pictures: int = 1) -> dict[str, Any]:
    reply = await client.post("/v1/chat/completions", json=question(level, pictures))
    assert reply.status_code == 200, reply.text
    receipt: dict[str, Any] = reply.json()["pruning"]
    return receipt


@pytest.mark.anyio
@pytest.mark.parametrize(("level", "pictures"), [("strong", 1), ("auto", 2)])
async def test_the_detail_tells_what_ran(client: httpx.AsyncClient, level: str, pictures: int) -> None:
    receipt = await told(client, level, pictures)
    detail, total = receipt["detail"], receipt["visual_tokens_total"]
    kept, sizes = detail["kept_tokens"], detail["token_sizes"]
    assert kept == sorted(set(kept))
    assert len(kept) == len(sizes) == receipt["visual_tokens"] < total
    assert sum(sizes) == total == len(detail["token_scores"])
    owners = detail["merged_into"][str(len(kept))]
    assert [owners.count(token) for token in kept] == sizes
    layers = detail["layers"]
    assert sorted(layer for kind in layers.values() for layer in kind) == list(range(receipt["layers_total"]))
    assert len(layers["run"]) + len(layers["frozen"]) == receipt["layers"]
    assert len(layers["frozen"]) == receipt["frozen_layers"]
    assert detail["seconds"].keys() == {"queue", "image", "encode", "route", "prefill", "decode"}


@pytest.mark.anyio
async def test_the_detail_offers_the_other_operating_points(client: httpx.AsyncClient, engine: Engine) -> None:
    receipt = await told(client, "strong")
    points = receipt["detail"]["operating_points"]
    assert len(points) == len(engine.menu["strong"].operating_points) > 2
    (chosen,) = (point for point in points if point["chosen"])
    for name in ("visual_tokens", "flops_ratio", "expected_agreement"):
        assert chosen[name] == receipt[name]
    assert chosen["layers"] == receipt["detail"]["layers"]
    assert points[-1]["expected_agreement"] == 1
    assert points[-1]["visual_tokens"] == receipt["visual_tokens_total"]
    for point in points[:-1]:
        assert 0 < point["expected_agreement"] < 1
        owners = receipt["detail"]["merged_into"].get(str(point["visual_tokens"]), range(receipt["visual_tokens_total"]))
        assert len(set(owners)) == point["visual_tokens"]


@pytest.mark.anyio
async def test_without_a_router_the_detail_tells_what_was_merged() -> None:
    engine = Engine(load(resolve("embedded")), Limits(kv_rows=20_000), token_policy="merging")
    engine.start()
    async with connect(engine) as client:
        merged, whole = [await told(client, level) for level in ("strong", "off")]
    engine.stop(0)
    detail = merged["detail"]
    owners = detail["merged_into"][str(merged["visual_tokens"])]
    assert [owners.count(token) for token in detail["kept_tokens"]] == detail["token_sizes"]
    assert detail["token_scores"] is detail["operating_points"][0]["expected_agreement"] is None
    assert whole["detail"]["kept_tokens"] == list(range(144))
    assert set(whole["detail"]["token_sizes"]) == {1}


@pytest.mark.anyio
async def test_the_detail_ends_a_stream_and_changes_no_answer(client: httpx.AsyncClient) -> None:
    stream = events((await client.post("/v1/chat/completions", json=question("strong", stream=True))).text)
    assert stream[-1]["pruning"]["detail"]["kept_tokens"]
    assert not any("pruning" in chunk for chunk in stream[:-1])
    asked = question("strong")
    asked["pruning"]["detail"] = False
    plain = (await client.post("/v1/chat/completions", json=asked)).json()
    assert "detail" not in plain["pruning"]
    assert plain["choices"][0]["message"]["content"] == "".join(c["choices"][0]["delta"].get("content", "") for c in stream)


@pytest.mark.anyio
async def test_the_detail_is_capped(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/chat/completions", json=question("off", MAX_DETAIL_IMAGES + 1))
    assert check_error(reply, 400)["param"] == "pruning.detail"


# ---- in a browser


@pytest.fixture
def address(engine: Engine) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app_of(engine), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


def ready_to_ask(page: Any) -> None:
    page.wait_for_selector("#levels tbody tr")
    page.wait_for_function("document.getElementById('preview').src.startsWith('data:')")


def answers(page: Any) -> list[str]:
    page.wait_for_selector(".ran:visible >> nth=1")
    page.wait_for_selector("#send:visible")
    return [text.strip() for text in page.locator(".answer").all_inner_texts()]


def check_accessibility(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def needs_a_key(route: Any) -> None:
    if route.request.headers.get("authorization") == "Bearer secret":
        route.continue_()
    else:
        route.fulfill(status=401, json={"error": {"message": "This server needs an API key."}})


@pytest.mark.browser
def test_a_persons_path(address: str, tmp_path: Path) -> None:
    """Ask at two levels, look at what was kept, ask on, copy the code, bring an own picture, err; in the dark, on a phone."""
    from playwright.sync_api import sync_playwright

    picture, text = tmp_path / "own.png", tmp_path / "notes.txt"
    Image.new("RGB", (300, 200), "red").save(picture)
    text.write_text("not a picture")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        context = browser.new_context(viewport={"width": 1100, "height": 900}, color_scheme="light")
        page = context.new_page()
        page.set_default_timeout(90_000)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: faults.append(request.url) if not request.url.startswith((address, "data:")) else None)
        page.add_init_script(COUNT_ANSWERED)
        page.goto(address)
        ready_to_ask(page)
        check_accessibility(page)

        # The sample's question at `off` and `strong`, as the page opens: in turn, so that neither waits for the other's work.
        page.get_by_role("button", name="Ask").click()
        assert answers(page) == ["four", "four"]
        assert page.evaluate("window.answered") == [0, 1]
        assert "Same answer" in page.locator("#verdict").inner_text()
        strong = page.get_by_role("article", name="Level strong")
        kept = int(strong.locator("dd").first.inner_text().split()[0])
        assert strong.locator(".dot").count() == kept < 144
        assert strong.locator(".gone").count() == 144 - kept
        assert strong.locator(".strip span").count() == 8
        check_accessibility(page)

        # The code on the page runs as it stands, and says the same.
        command = page.locator("#snippet").inner_text()
        reply = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert '"content":"four"' in reply
        assert '"level":"strong"' in reply

        # What a token stands for, by keyboard; and another operating point.
        strong.get_by_role("slider", name="Kept visual tokens").press("ArrowRight")
        assert re.search(r"Row \d+, column \d+ stands for", strong.locator(".token").inner_text())
        strong.get_by_role("slider", name="Operating point").press("End")
        assert strong.locator(".dot").count() == 0
        assert "100.0 %" in strong.locator(".point").inner_text()

        # A follow-up in the same chat.
        page.get_by_label("Question", exact=True).fill("What color is the star?")
        page.keyboard.press("Enter")
        page.wait_for_selector("#chat li")
        assert answers(page)[0] == "white"
        assert "How many objects are there?" in page.locator("#chat").inner_text()
        assert "What color is the star?" in page.locator("#snippet").inner_text()
        page.get_by_role("button", name="Python").click()
        assert '"level": "strong"' in page.locator("#snippet").inner_text()

        # An own picture begins anew; what is no picture is refused in words.
        page.locator("#file").set_input_files(picture)
        page.wait_for_selector("#result", state="hidden")
        page.get_by_label("Compare with").select_option("")
        page.get_by_label("Question", exact=True).fill("What color is the star?")
        page.get_by_role("button", name="Ask").click()
        page.wait_for_selector(".ran:visible")
        assert page.locator(".panel").count() == 1
        words = "async () => (await import('/playground/words.js')).difference(['a', 'red', 'star'], ['a', 'white', 'star'])"
        assert page.evaluate(words) == [[False, True, False], [False, True, False]]
        page.locator("#file").set_input_files(text)
        page.get_by_role("alert").get_by_text("not a picture").wait_for()
        assert not faults

        # The server says no.
        page.route("**/v1/chat/completions", lambda route: route.fulfill(
            status=429, json={"error": {"message": "The queue is full."}}, headers={"Retry-After": "3"}))  # fmt: skip
        page.get_by_label("Question", exact=True).fill("Anything else?")
        page.get_by_role("button", name="Ask").click()
        page.get_by_role("alert").get_by_text("The queue is full. Try again in 3 s.").wait_for()

        phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        phone.set_default_timeout(90_000)
        phone.route("**/v1/**", needs_a_key)
        phone.goto(address)
        phone.get_by_role("alert").get_by_text("Enter a key below.").wait_for()
        check_accessibility(phone)
        phone.get_by_label("API key", exact=True).fill("secret")
        phone.get_by_role("button", name="Use it").click()
        ready_to_ask(phone)
        phone.get_by_role("button", name="Ask").click()
        answers(phone)
        assert phone.evaluate("document.documentElement.scrollWidth") == 390
        check_accessibility(phone)
        browser.close()
