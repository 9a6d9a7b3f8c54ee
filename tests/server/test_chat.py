"""Messages to turns, the choice of a level, and the two forms of an answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server import chat, replies
from server.errors import InvalidRequest, UnknownLevel
from server.refused import NEUTRAL, UNSUPPORTED
from server.request import PreparedRequest, Sampling
from server.schemas import ChatRequest, CompletionRequest, Generation, VqaRequest, parse
from server.served import Served
from server.settings import Settings
from tests.server.fake_engine import FakeEngine

TEXT = {"type": "text", "text": "What color is the star?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
ASK = [{"role": "user", "content": "hello"}]


def chat_request(**fields: Any) -> ChatRequest:
    return parse(ChatRequest, json.dumps({"messages": ASK, **fields}).encode())


def conversation(*messages: dict[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    found = chat.conversation(chat_request(messages=messages).messages)
    return found.turns, [place for place, _ in found.images]


def test_a_conversation_keeps_the_order_of_its_parts() -> None:
    turns, places = conversation(
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, TEXT, IMAGE]},
        {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [TEXT, IMAGE]},
    )
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert turns[1]["content"] == [{"type": "image"}, TEXT, {"type": "image"}]
    assert places == [f"messages[{i}].content[{j}].image_url.url" for i, j in ((1, 0), (1, 2), (3, 1))]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{"role": "system", "content": [IMAGE]}, ASK[0]], "messages[0].content[0]"),
        ([ASK[0], {"role": "assistant", "content": [TEXT, IMAGE]}], "messages[1].content[1]"),
        ([{"role": "user", "content": " \n"}], "messages"),
        ([{"role": "user", "content": []}], "messages"),
        ([{"role": "system", "content": "hello"}], "messages"),
    ],
)
def test_conversations_that_ask_nothing_or_misplace_pictures(messages: list[dict[str, Any]], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        conversation(*messages)
    assert refusal.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 7}}]}]},
            "messages[0].content[0].image_url.url",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "", "detail": "x"}}]}]},
            "messages[0].content[0].image_url.detail",
        ),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_p": float("inf")}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": [1]}, "stop[0]"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"presence_penalty": float("-inf")}, "presence_penalty"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"pruning": {"level": 3}}, "pruning.level"),
        ({"pruning": "strong"}, "pruning"),
        ({"pruning": {"levle": "strong"}}, "pruning.levle"),
        ({"level": "strong"}, "level"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"red": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"model": 3}, "model"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        chat_request(**fields)
    assert refusal.value.param == param
    assert refusal.value.message.startswith(f"{param}: ")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": [' * 10_000, b'{"a": "\\ud800"}'])
def test_a_body_that_is_no_json_object(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(ChatRequest, body)


def test_nulls_and_unknown_fields_are_tolerated() -> None:
    names = [name for name in ChatRequest.model_fields if name != "messages"]
    assert chat_request(**dict.fromkeys(names)).sampling(64) == Sampling(max_tokens=64)
    assert chat_request(user="me", stream_options={"continuous_usage_stats": 1}).sampling(64) == Sampling(64)
    image = {"type": "image_url", "image_url": {"url": "data:", "detail": None}}
    options: dict[str, Any] = {"stream_options": {"include_usage": None}, "pruning": {"level": None}}
    nested = chat_request(messages=[{"role": "user", "content": [image]}], **options)
    assert nested.messages[0].content[0].image_url.detail == "auto"  # type: ignore[union-attr]


REAL_VALUES: dict[str, Any] = {"n": 2, "top_logprobs": 1, "length_penalty": 0.5, "best_of": 2}


@pytest.mark.parametrize("body", [ChatRequest, CompletionRequest, VqaRequest])
def test_what_would_change_the_answer_is_refused_by_name(body: type[Generation]) -> None:
    needed = {"messages": ASK, "prompt": "hello", "image": "", "question": "what?"}
    needed = {name: value for name, value in needed.items() if name in body.model_fields}
    for name, neutral in UNSUPPORTED.items():
        if name in body.model_fields:
            continue
        for value in (*NEUTRAL, *neutral):
            parse(body, json.dumps({**needed, name: value}).encode())
        with pytest.raises(InvalidRequest, match="not supported") as refusal:
            parse(body, json.dumps({**needed, name: REAL_VALUES.get(name, {"some": "value"})}).encode())
        assert refusal.value.param == name


def test_the_template_may_go_on_with_an_answer() -> None:
    engine = FakeEngine()
    messages = [*ASK, {"role": "assistant", "content": "The star is"}]
    for fields, template in (
        ({}, {"generation": True, "continued": False}),
        ({"add_generation_prompt": False}, {"generation": False, "continued": False}),
        ({"continue_final_message": True}, {"generation": False, "continued": True}),
    ):
        chat.read_chat(Served([engine]), Settings(), json.dumps({"messages": messages, **fields}).encode(), None)
        assert engine.preprocessor.template == template


@pytest.mark.parametrize("fields", [{"stop_token_ids": [1000]}, {"logit_bias": {"1000": 1}}])
def test_tokens_that_do_not_exist_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="vocabulary ends at token 999"):
        chat.read_chat(Served([FakeEngine()]), Settings(), json.dumps({"messages": ASK, **fields}).encode(), None)


def test_sampling_takes_every_field() -> None:
    request = chat_request(
        temperature=1, top_p=0.5, top_k=3, seed=-7, stop="\n", max_tokens=9, max_completion_tokens=5,
        frequency_penalty=-2, presence_penalty=2, logprobs=True, top_logprobs=4, min_p=0.1, repetition_penalty=1.5,
        logit_bias={"7": -100}, min_tokens=2, ignore_eos=True, stop_token_ids=[8],
    )  # fmt: skip
    assert request.sampling(64) == Sampling(
        5, 1.0, 0.5, 3, -7, ("\n",), -2.0, 2.0, 4, 0.1, 1.5, ((7, -100.0),), 2, True, (8,)
    )
    assert chat_request(logprobs=True).sampling(64).logprobs == 0
    assert chat_request(logprobs=False).sampling(64).logprobs is None


def test_a_forms_numbers_are_text() -> None:
    form = {"image": [b"file"], "question": "what?", "max_tokens": "5", "temperature": "0.5", "seed": "-3", "stop": "."}
    assert parse(VqaRequest, form).sampling(64) == Sampling(5, 0.5, seed=-3, stop=(".",))
    for wrong in ({"max_tokens": "five"}, {"temperature": "nan"}, {"seed": "1.5"}):
        with pytest.raises(InvalidRequest):
            parse(VqaRequest, form | wrong)


# ---- the level

SOURCES = {"header": "off", "body": "light", "alias": "balanced", "detail": "strong"}


@pytest.mark.parametrize("first", range(5))
def test_the_level_comes_from_the_first_that_names_one(first: int) -> None:
    given: dict[str, Any] = {key: level if i >= first else None for i, (key, level) in enumerate(SOURCES.items())}
    expected = [*((level, key) for key, level in SOURCES.items()), ("off", "default")][first]
    assert chat.choose_level(FakeEngine(), **given) == expected


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("level", ["", "OFF", "nonsense"])
def test_an_unknown_level_is_answered_with_the_menu(source: str, level: str) -> None:
    given: dict[str, Any] = dict.fromkeys(SOURCES) | {"header": "off", source: level}
    with pytest.raises(UnknownLevel, match="off, light, balanced, strong"):
        chat.choose_level(FakeEngine(), **given)


@pytest.mark.parametrize(
    ("details", "level"),
    [
        ([], None),
        (["auto", "auto"], None),
        (["low"], "strong"),
        (["high"], "off"),
        (["low", "high", "low"], "off"),
        (["low", "auto"], "light"),
        (["auto", "high"], "off"),
    ],
)
def test_with_several_pictures_the_fullest_detail_wins(details: list[str], level: str | None) -> None:
    engine = FakeEngine()
    engine.default_level = "light"
    assert chat.hinted_level(engine, details) == level


def test_a_hint_at_a_level_off_the_menu_means_the_default() -> None:
    engine = FakeEngine()
    del engine.menu["strong"]
    assert chat.hinted_level(engine, ["low"]) == "off"


@pytest.mark.parametrize(("messages", "follow_up"), [(ASK, False), ([{"role": "system", "content": "Be brief."}, *ASK], False),
                                                ([*ASK, {"role": "assistant", "content": "hi"}, *ASK], True)])  # fmt: skip
def test_a_question_behind_an_answer_is_a_follow_up(messages: list[dict[str, Any]], follow_up: bool) -> None:
    body = json.dumps({"messages": messages}).encode()
    assert chat.read_chat(Served([FakeEngine()]), Settings(), body, None).follow_up == follow_up


# ---- limits before work


def test_a_text_that_can_never_fit_is_not_tokenised() -> None:
    engine = FakeEngine()
    body = json.dumps({"messages": [{"role": "user", "content": "a" * 64 * engine.context_length + "b"}]}).encode()
    with pytest.raises(InvalidRequest, match="maximum context length is 2000 tokens"):
        chat.read_chat(Served([engine]), Settings(), body, None)
    assert not engine.preprocessor.turns


# ---- the two forms


async def chunks_of(*chunks: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    for chunk in chunks:
        yield chunk


def piece(index: int, content: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": index, "delta": {"content": content}, "logprobs": None, "finish_reason": finish}
    return {"id": "x", "choices": [choice]}


def prepared(**fields: Any) -> PreparedRequest:
    return PreparedRequest(FakeEngine(), "x", "fake-llava", [], [], 0.0, "off", "default", Sampling(), **fields)


@pytest.mark.anyio
async def test_interleaved_choices_fold_apart() -> None:
    reply = await replies.fold(chunks_of(piece(1, "b"), {}, piece(0, "a"), piece(1, "B", "stop"), piece(0, "A", "length")))
    told = [(choice["message"]["content"], choice["finish_reason"]) for choice in reply["choices"]]
    assert told == [("aA", "length"), ("bB", "stop")]


@pytest.mark.anyio
async def test_silence_is_a_comment_and_usage_is_optional() -> None:
    usage = {"id": "x", "choices": [], "usage": {"total_tokens": 3}}
    plain = [event async for event in replies.chat_events(chunks_of(piece(0, "é"), {}, usage), prepared())]
    assert [event.split(":")[0] for event in plain] == ["data", "", "data"]
    assert plain[-1] == "data: [DONE]\n\n"
    full = [event async for event in replies.chat_events(chunks_of(piece(0, "é"), usage), prepared(include_usage=True))]
    assert [json.loads(event[6:])["usage"] for event in full[:-1]] == [None, {"total_tokens": 3}]


@pytest.mark.anyio
async def test_a_bug_in_the_middle_of_a_stream_is_told_without_details(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> AsyncIterator[dict[str, Any]]:
        yield piece(0, "a")
        raise ZeroDivisionError("secret")

    events = [event async for event in replies.chat_events(broken(), prepared())]
    assert json.loads(events[1][6:])["error"]["type"] == "server_error"
    assert "secret" not in "".join(events)
    assert events[2] == "data: [DONE]\n\n"
    assert "ZeroDivisionError: secret" in caplog.text
