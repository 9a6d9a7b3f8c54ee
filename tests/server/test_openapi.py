"""The document of the API says what is accepted and answered, and its page needs nobody else."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from models.checkpoint import Checkpoint
from server.openapi import EXAMPLES
from tests.server.client import app_of
from tests.server.test_playground import CHROMIUM, FLAGS
from tests.server.tiny import new_engine
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # fixture

CONFIG = Path(__file__).parent / "schemathesis.toml"
CASES = [(path, name) for path, examples in EXAMPLES.items() for name in examples]


@pytest.fixture(scope="module")
def url(tiny: Checkpoint) -> Iterator[str]:
    engine = new_engine(tiny)
    engine.start()
    app = app_of(engine, default_max_tokens=4)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield "http://{}:{}".format(*listener.getsockname())
        server.should_exit = True
        thread.join()
    engine.stop(5)


@pytest.mark.parametrize(("path", "name"), CASES)
def test_examples_run(url: str, path: str, name: str) -> None:
    operation: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()["paths"][path]["post"]
    example = operation["requestBody"]["content"]["application/json"]["examples"][name]["value"]
    reply = httpx.post(url + path, json=example, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].split(";")[0] in operation["responses"]["200"]["content"]


def test_every_route_that_takes_a_body_has_examples(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    posts = {path for path, routes in document["paths"].items() if "post" in routes}
    assert posts - {"/v1/admin/models"} == EXAMPLES.keys()


def test_names_are_those_of_the_server(url: str) -> None:
    schemas = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
    assert schemas["Level"]["enum"] == ["off", "light", "balanced", "strong", "thin"]
    assert "tiny-llava@thin" in schemas["Model"]["enum"]
    references = set(re.findall('"#/components/schemas/([^"]+)"', json.dumps(schemas)))
    assert references <= schemas.keys()


def test_every_route_stands_under_a_heading(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    headings = [tag["name"] for tag in document["tags"]]
    used = [route.get("tags") for routes in document["paths"].values() for route in routes.values()]
    assert all(len(tags) == 1 for tags in used) and {tag for (tag,) in used} == set(headings)
    headers = {header["name"] for header in document["paths"]["/v1/chat/completions"]["post"]["parameters"]}
    assert headers == {"X-Pruning-Level", "X-Request-Deadline-Ms", "x-slo-ttft-ms"}


@pytest.mark.slow
def test_schemathesis_finds_nothing(url: str) -> None:
    command = [
        sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", f"{url}/openapi.json", "--checks", "all",
        "--max-examples", "3", "--phases", "examples,fuzzing", "--seed", "0", "--no-color",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, cwd=CONFIG.parents[2], timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]


def test_the_page_is_whole_without_a_network(url: str) -> None:
    page = httpx.get(f"{url}/docs")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "//" not in policy
    sources = re.findall('(?:src|href)="([^"]+)"', page.text)
    assert len(sources) == 4
    for source in sources:
        assert "//" not in source
        assert httpx.get(f"{url}/{source}").status_code == 200


@pytest.mark.browser
def test_the_page_shows_the_routes(url: str) -> None:
    from playwright.sync_api import sync_playwright

    asked, said = [], []
    with sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.goto(f"{url}/docs")
        page.get_by_text("/v1/chat/completions", exact=False).first.click()
        page.get_by_text("What color is the picture?", exact=False).first.wait_for()
        browser.close()
    assert not said
    assert all(address.startswith((url, "data:")) for address in asked)
