"""The HTTP contract, over an engine without a model, in process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from anyio import to_thread

from server import replies
from server.chat import read_chat
from server.served import Served
from server.settings import Settings, read_settings
from tests.server.client import MENU, PICTURE, QUESTION, ask, body, check_error, connect, events, image_part
from tests.server.client import client as client  # fixtures
from tests.server.client import engine as engine
from tests.server.fake_engine import LAYERS, VISUAL_TOKENS, FakeEngine, picture

pytestmark = pytest.mark.anyio


# ---- answers


async def test_a_chat_is_answered(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await ask(client, body(image_part(), image_part(), pruning={"level": "strong"}))
    reply = response.json()
    assert response.status_code == 200
    assert reply["object"] == "chat.completion"
    assert (reply["model"], reply["system_fingerprint"]) == ("fake-llava", "fp_fake")
    assert reply["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": "A red star."}
    assert reply["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert reply["pruning"] == {
        "level": "strong", "reason": "body", "visual_tokens": 4, "visual_tokens_total": 24, "layers": 15,
        "layers_total": 16, "frozen_layers": 0, "flops_ratio": 0.5, "checkpoint": "fp_fake", "expected_agreement": None,
    }  # fmt: skip
    prompt = 2 * VISUAL_TOKENS + 5
    assert reply["usage"] == {
        "prompt_tokens": prompt, "completion_tokens": 4, "total_tokens": prompt + 4,
        "prompt_tokens_details": {"cached_tokens": 0}, "image_tokens": 24, "image_tokens_kept": 4,
    }  # fmt: skip
    assert response.headers["x-pruning-level"] == "strong"
    assert response.headers["x-pruning-visual-tokens"] == "4/24"
    assert response.headers["x-pruning-layers"] == f"15/{LAYERS}"
    stages = response.headers["server-timing"].split(", ")
    assert [stage.split(";dur=")[0] for stage in stages] == ["queue", "image", "encode", "route", "prefill", "decode"]
    assert stages[-1] == "decode;dur=8.00"
    assert not engine.aborted


async def test_a_question_without_a_picture_is_answered(client: httpx.AsyncClient) -> None:
    reply = (await ask(client, {"messages": [{"role": "user", "content": "Hello there"}]})).json()
    assert (reply["usage"]["image_tokens"], reply["usage"]["image_tokens_kept"]) == (0, 0)


async def test_several_turns_reach_the_template(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    turns = [{"role": "system", "content": "Be brief."}, *body(image_part())["messages"]]
    turns += [{"role": "assistant", "content": "Red."}, {"role": "user", "content": "And its <image> shape?"}]
    assert (await ask(client, {"messages": turns})).status_code == 200
    assert [turn["role"] for turn in engine.preprocessor.turns] == ["system", "user", "assistant", "user"]
    assert engine.preprocessor.turns[-1]["content"] == [{"type": "text", "text": "And its <image> shape?"}]


async def test_a_stream_holds_what_the_whole_reply_does(client: httpx.AsyncClient) -> None:
    fields: dict[str, Any] = {"n": 2, "temperature": 1, "seed": 7, "logprobs": True, "top_logprobs": 2}
    whole = (await ask(client, body(image_part(), **fields))).json()
    fields |= {"stream": True, "stream_options": {"include_usage": True}}
    response = await ask(client, body(image_part(), **fields))
    chunks = events(response.text)

    async def replay() -> AsyncIterator[dict[str, Any]]:
        for chunk in chunks:
            yield chunk

    folded = await replies.fold(replay())
    same = ("object", "model", "system_fingerprint", "choices", "pruning", "usage")
    assert {key: folded[key] for key in same} == {key: whole[key] for key in same}


async def test_a_stream_has_openais_shape(client: httpx.AsyncClient) -> None:
    response = await ask(client, body(image_part(), stream=True), headers={"X-Pruning-Level": "light"})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-pruning-level"] == "light"
    assert response.headers["x-pruning-visual-tokens"] == "8/12"
    stages = response.headers["server-timing"].split(", ")
    assert [stage.split(";")[0] for stage in stages] == ["queue", "image", "encode", "route", "prefill"]
    chunks = events(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "A red star."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert chunks[-1]["pruning"]["reason"] == "header"
    assert not any("usage" in chunk for chunk in chunks)


async def test_the_usage_comes_last_when_asked_for(client: httpx.AsyncClient) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    *chunks, last = events((await ask(client, body(image_part(), **fields))).text)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_silence_in_a_stream_is_filled(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 0.01)
    engine.hold_after = 1
    prepared = read_chat(Served([engine]), Settings(), json.dumps(body(image_part(), stream=True)).encode(), None)
    stream = replies.chat_events(replies.AnswerStream(prepared, 0.0).chunks(), prepared)
    assert '"role":"assistant"' in await anext(stream)
    assert await anext(stream) == replies.KEEP_AWAKE
    engine.release.set()
    rest = "".join([event async for event in stream])
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in events(rest)) == "A red star."


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stopped_engine_ends_the_wait(
    client: httpx.AsyncClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr(replies, "KEEP_ALIVE_S", 0.01)
    engine.hold_after, engine.alive = 0, False
    check_error(await ask(client, body(image_part(), stream=stream)), 500)
    engine.release.set()


async def test_choices_are_requests_with_seeds_of_their_own(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    reply = (await ask(client, body(image_part(), n=3, temperature=1, seed=2**63 - 2))).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    seeds = [2**63 - 2, 2**63 - 1, 0]
    assert [choice["message"]["content"] for choice in reply["choices"]] == [f"seed {seed}" for seed in seeds]
    assert [request.id for request in engine.submitted] == [f"{reply['id']}-{i}" for i in range(3)]
    assert reply["usage"]["completion_tokens"] == 3
    assert reply["usage"]["prompt_tokens"] == VISUAL_TOKENS + 5


async def test_logprobs_are_finite_json(client: httpx.AsyncClient) -> None:
    reply = (await ask(client, body(image_part(), logprobs=True, top_logprobs=2))).json()
    content = reply["choices"][0]["logprobs"]["content"]
    own = {"token": "A", "logprob": -0.25, "bytes": [65]}
    never = {"token": "\N{SNOWMAN}", "logprob": -9999.0, "bytes": [226, 152, 131]}
    assert content[0] == {**own, "top_logprobs": [own, never]}
    assert [entry["token"] for entry in content] == ["A", " red", " star", "."]


async def test_the_length_limit_has_a_default(engine: FakeEngine) -> None:
    async with connect(engine, default_max_tokens=2) as client:
        reply = (await ask(client)).json()
        assert reply["choices"][0]["finish_reason"] == "length"
        await ask(client, body(image_part(), max_tokens=3))
        await ask(client, body(image_part(), max_tokens=3, max_completion_tokens=4))
    assert [request.sampling.max_tokens for request in engine.submitted] == [2, 3, 4]


# ---- levels


async def test_header_body_alias_and_detail_make_the_same_request(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    ways: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
        "header": (body(image_part()), {"X-Pruning-Level": "strong"}),
        "body": (body(image_part(), pruning={"level": "strong"}), {}),
        "alias": (body(image_part(), model="fake-llava@strong"), {}),
        "detail": (body(image_part(detail="low")), {}),
    }
    answers = [(await ask(client, payload, headers=headers)).json() for payload, headers in ways.values()]
    assert [answer["pruning"]["reason"] for answer in answers] == list(ways)
    assert answers[2]["model"] == "fake-llava@strong"
    requests = [
        (r.prompt, [image.digest for image in r.images], r.level, r.sampling, set(r.timings)) for r in engine.submitted
    ]
    assert all(request == requests[0] for request in requests)
    assert engine.submitted[0].level == "strong"


@pytest.mark.parametrize(
    ("way", "param"),
    [
        ({"headers": {"X-Pruning-Level": "x"}}, "X-Pruning-Level"),
        ({"pruning": {"level": "x"}}, "pruning.level"),
        ({"model": "fake-llava@x"}, "model"),
    ],
)
async def test_an_unknown_level_is_refused_with_the_menu(client: httpx.AsyncClient, way: dict[str, Any], param: str) -> None:
    headers = way.pop("headers", {})
    error = check_error(await ask(client, body(image_part(), **way), headers=headers), 400)
    assert (error["code"], error["param"]) == ("unknown_pruning_level", param)
    assert all(level in error["message"] for level in MENU)


async def test_models_and_menu(client: httpx.AsyncClient) -> None:
    models = (await client.get("/v1/models")).json()
    names = [model["id"] for model in models["data"]]
    assert names == ["fake-llava", *(f"fake-llava@{level}" for level in MENU)]
    for model in models["data"]:
        assert (await client.get(f"/v1/models/{model['id']}")).json() == model
    cards = [model["pruning"]["card"] for model in models["data"]]
    assert cards[:3] == [{"accuracy": 0.97}, {"accuracy": 0.97}, None], "of the default level, and of each alias"
    check_error(await client.get("/v1/models/fake-llava@x"), 404)
    levels = (await client.get("/v1/pruning/levels")).json()
    assert [level["name"] for level in levels["data"]] == MENU
    assert levels["default"] == "off"
    assert levels["data"][0]["card"] == {"accuracy": 0.97}
    assert [len(level["operating_points"]) for level in levels["data"]] == [1] * len(MENU)


# ---- /v1/vqa


async def test_a_form_with_files(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    files = [("image", ("a.png", picture(), "image/png")), ("image", ("b", picture("WEBP"), "text/plain"))]
    data = {"question": QUESTION, "level": "light", "max_tokens": "3", "temperature": "0.5", "seed": "4", "logit_bias": '{"5": 1}'}
    response = await client.post("/v1/vqa", files=files, data=data)
    reply = response.json()
    assert response.status_code == 200
    assert set(reply) == {"answer", "finish_reason", "pruning", "usage", "model", "id"}
    assert (reply["answer"], reply["pruning"]["level"], reply["pruning"]["reason"]) == ("seed 4", "light", "body")
    assert response.headers["x-pruning-visual-tokens"] == "16/24"
    assert engine.submitted[0].sampling.max_tokens == 3
    assert engine.submitted[0].sampling.logit_bias == ((5, 1.0),)
    kinds = [part["type"] for part in engine.preprocessor.turns[0]["content"]]
    assert kinds == ["image", "image", "text"]


@pytest.mark.parametrize("image", [PICTURE, PICTURE.partition(",")[2], [PICTURE, PICTURE]])
async def test_json_with_data_urls_or_base64(client: httpx.AsyncClient, image: str | list[str]) -> None:
    payload = {"image": image, "question": QUESTION, "model": "fake-llava@strong"}
    reply = (await client.post("/v1/vqa", json=payload)).json()
    assert reply["answer"] == "A red star."
    assert reply["pruning"]["reason"] == "alias"


async def test_lists_in_a_form(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """One by one, or as JSON."""
    for stop, tokens in ((["star", "xyz"], ["5", "6"]), ('["star", "xyz"]', "[5, 6]"), (["star", '["xyz"]'], ["[5]", "6"])):
        data = {"question": QUESTION, "stop": stop, "stop_token_ids": tokens}
        response = await client.post("/v1/vqa", files={"image": picture()}, data=data)
        assert response.status_code == 200, response.text
        sampling = engine.submitted[-1].sampling
        assert (sampling.stop, sampling.stop_token_ids) == (("star", "xyz"), (5, 6))


@pytest.mark.parametrize(
    ("files", "data", "param"),
    [
        (["image", "image2"], {}, "image2"),
        (["image", "images"], {}, "images"),
        (["images"], {}, "images"),
        (["image", "question"], {}, "question"),
        (["image"], {"question": [QUESTION, "What is blue?"]}, "question"),
        (["image"], {"level": ["strong", "off"]}, "level"),
        (["image"], {"logit_bias": ['{"5": 1}', '{"6": 1}']}, "logit_bias"),
        (["image"], {"stop": "[INST]"}, "stop"),
        (["image"], {"stop_token_ids": "five"}, "stop_token_ids[0]"),
    ],
)
async def test_nothing_of_a_form_is_dropped(
    client: httpx.AsyncClient, engine: FakeEngine, files: list[str], data: dict[str, Any], param: str
) -> None:
    parts = [(name, picture()) for name in files]
    response = await client.post("/v1/vqa", files=parts, data={"question": QUESTION} | data)
    assert check_error(response, 400)["param"] == param
    assert not engine.submitted


async def test_a_form_and_json_make_the_same_request(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/vqa", files={"image": picture()}, data={"question": QUESTION})
    await client.post("/v1/vqa", json={"image": PICTURE, "question": QUESTION})
    await ask(client)
    requests = [(r.prompt, r.images[0].digest, r.level, r.sampling) for r in engine.submitted]
    assert requests[0] == requests[1] == requests[2]


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        ({"question": QUESTION}, "image"),
        ({"image": [], "question": QUESTION}, "image"),
        ({"image": None, "question": QUESTION}, "image"),
        ({"image": PICTURE}, "question"),
        ({"image": PICTURE, "question": " "}, "question"),
        ({"image": PICTURE, "question": QUESTION, "level": "x"}, "level"),
        ({"image": PICTURE, "question": QUESTION, "pruning": {"level": "off"}}, "pruning"),
        ({"image": PICTURE, "question": QUESTION, "max_tokens": "5"}, "max_tokens"),
        ({"image": [PICTURE, "no base64!"], "question": QUESTION}, "image[1]"),
        ({"image": "https://example.com/a.png", "question": QUESTION}, "image[0]"),
    ],
)
async def test_vqa_names_what_is_wrong(client: httpx.AsyncClient, payload: dict[str, Any], param: str) -> None:
    assert check_error(await client.post("/v1/vqa", json=payload), 400)["param"] == param


async def test_forms_that_are_wrong(client: httpx.AsyncClient) -> None:
    fine = {"question": QUESTION}
    many = [("image", picture())] * 17
    check_error(await client.post("/v1/vqa", data=fine), 400)  # urlencoded, so no JSON
    check_error(await client.post("/v1/vqa", files={"picture": b""}, data=fine), 400)
    check_error(await client.post("/v1/vqa", files={"image": picture()}, data=fine | {"max_tokens": "x"}), 400)
    check_error(await client.post("/v1/vqa", files=many, data=fine), 400)
    for text, status in (("red", 400), ("[" * 50_000, 400), (f"[{'[],' * 200_000}1]", 413)):
        check_error(await client.post("/v1/vqa", files={"image": picture()}, data=fine | {"logit_bias": text}), status)
    check_error(await client.post("/v1/vqa", files={"image": picture("BMP")}, data=fine), 415)
    headers = {"content-type": "multipart/form-data"}
    check_error(await client.post("/v1/vqa", content=b"no boundary", headers=headers), 400)
    assert (await client.post("/v1/vqa", files={"image": picture()}, data=fine)).status_code == 200


# ---- ids, probes, documentation


@pytest.mark.parametrize("given", ["a.B-c_9", "x" * 128])
async def test_a_sane_request_id_is_echoed(client: httpx.AsyncClient, given: str) -> None:
    response = await ask(client, headers={"X-Request-Id": given})
    assert response.headers.get_list("x-request-id") == [given]
    assert given not in response.json()["id"]


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", "<script>"])
async def test_any_other_request_id_is_replaced(client: httpx.AsyncClient, given: str) -> None:
    first, second = [(await client.get("/live", headers={"X-Request-Id": given})).headers["x-request-id"] for _ in "ab"]
    assert given not in (first, second)
    assert first != second


async def test_probes(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for path in ("/live", "/ready", "/health"):
        assert (await client.get(path)).status_code == 200
    engine.ready = False
    for path in ("/ready", "/health"):
        response = await client.get(path)
        assert check_error(response, 503)["code"] == "not_ready"
        assert response.headers["retry-after"] == "1"
    assert (await client.get("/live")).status_code == 200
    engine.alive = False
    check_error(await client.get("/live"), 503)


async def test_the_loop_is_free_while_a_picture_is_read(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.preprocessor.may_finish.clear()
    asking = asyncio.create_task(ask(client))
    assert await to_thread.run_sync(engine.preprocessor.busy.wait, 30)
    assert (await client.get("/live")).status_code == 200
    engine.preprocessor.may_finish.set()
    assert (await asking).status_code == 200


async def test_metrics_and_the_rest(client: httpx.AsyncClient) -> None:
    await ask(client, body(model="gpt-4o"))
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    assert 'espalier_rejections_total{reason="model_not_found"} 1.0' in response.text
    assert (await client.get("/version")).json()["model"] == "fake-llava"
    assert (await client.get("/docs")).status_code == 200


async def test_every_reference_in_the_api_description_resolves(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
            node = list(node.values())
        if isinstance(node, list):
            for child in node:
                yield from references(child)

    found = set(references(description))
    assert "#/components/schemas/ChatRequest" in found
    assert {name.rpartition("/")[2] for name in found} <= description["components"]["schemas"].keys()


# ---- settings


def test_stray_environment_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_MAX_BATCH", "3")
    assert Settings().max_batch == 3
    monkeypatch.setenv("ESPALIER_CACHE", "/cache")  # read elsewhere
    assert Settings().max_batch == 3
    monkeypatch.setenv("ESPALIER_MAX_BATCHES", "3")
    with pytest.raises(ValueError, match=r"ESPALIER_MAX_BATCHES.*Known: .*ESPALIER_MAX_BATCH,"):
        Settings()


def test_a_kubernetes_service_of_our_name_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPALIER_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("ESPALIER_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(ValueError, match="enableServiceLinks: false"):
        Settings()


@pytest.mark.parametrize("value", ["https://a.example, https://b.example", '["https://a.example", "https://b.example"]'])
def test_a_variable_may_hold_several_values(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ESPALIER_CORS_ORIGINS", value)
    monkeypatch.setenv("ESPALIER_MODEL", "small=embedded,large=smol")
    settings = read_settings({})
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert settings.checkpoints() == [("small", "embedded"), ("large", "smol")]


@pytest.mark.parametrize(
    "given",
    [
        {"cors_origins": ["foo"]}, {"allow_image_hosts": ["http://x"]}, {"allowed_hosts": ["a b"]}, {"model": ["x"]},
        {"served_model_name": "foo", "model": ["a=x"]}, {"served_model_name": "a@b"},
        {"otlp_endpoint": "nothttp"}, {"otlp_endpoint": "localhost:4318"}, {"otlp_endpoint": "http:///v1"},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_named(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        read_settings(given)


def test_settings_are_typed_and_frozen() -> None:
    with pytest.raises(ValueError, match="max_batch"):
        Settings(max_batch=0)
    with pytest.raises(ValueError, match="typo"):
        Settings(typo=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1
