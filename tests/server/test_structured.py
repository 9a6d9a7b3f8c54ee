"""Structured answers, through the engine with the real tokenizer: whatever the model would say, the answer has its form."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import llguidance.hf
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.engine import Engine
from server.errors import InvalidRequest
from server.json_schema import check_schema, closed
from server.schema_parts import Function
from server.structured import choice_grammar, compile_grammar
from server.tools import AnswerReader, ToolUse
from tests.server.client import PICTURE, QUESTION, app_of, body, check_error, events, image_part
from tests.server.tiny import LEVELS, new_engine
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # a fixture

pytestmark = pytest.mark.anyio

SCHEMA = {
    "type": "object",
    "properties": {
        "color": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["color", "count", "name", "tags"],
    "additionalProperties": False,
}
COLORS = ["red", "red star", "blue", "dark \"blue\"\n"]
COLOR = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"], "additionalProperties": False}
PAINT: dict[str, Any] = {"name": "paint", "description": "Paint it.", "parameters": COLOR}
STOP = {"name": "stop"}
TOOLS = [{"type": "function", "function": PAINT}, {"type": "function", "function": STOP}]


@pytest.fixture(scope="module")
def running(tiny: Any) -> Any:
    engine = new_engine(tiny)
    engine.start()
    yield engine
    engine.stop()


@pytest.fixture
async def client(running: Engine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app_of(running))
    async with httpx.AsyncClient(transport=transport, base_url="http://espalier") as client:
        yield client


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json={**body(image_part(), max_tokens=200), "model": None, **fields})


def schema_format(schema: dict[str, Any] = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, **more}}


@pytest.mark.parametrize("level", LEVELS)
async def test_json_fits_the_schema_at_every_level(client: httpx.AsyncClient, level: str) -> None:
    asked = {"response_format": schema_format(), "pruning": {"level": level}, "n": 3, "temperature": 2, "seed": 5}
    reply = (await ask(client, **asked, logprobs=True, top_logprobs=2)).json()
    for choice in reply["choices"]:
        content = choice["message"]["content"]
        jsonschema.validate(json.loads(content), SCHEMA)
        assert choice["finish_reason"] == "stop"
        assert bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"]).decode() == content
    assert len({choice["message"]["content"] for choice in reply["choices"]}) == 3
    streamed = events((await ask(client, **asked, stream=True)).text)
    for index, choice in enumerate(reply["choices"]):
        pieces = [one["delta"].get("content", "") for chunk in streamed for one in chunk["choices"] if one["index"] == index]
        assert "".join(pieces) == choice["message"]["content"]


@pytest.mark.parametrize(
    "form",
    [
        {"guided_json": SCHEMA},
        {"structured_outputs": {"json": SCHEMA}},
        {"response_format": schema_format(strict=True), "tools": TOOLS, "tool_choice": "none"},
    ],
)
async def test_a_schema_has_several_names(client: httpx.AsyncClient, form: dict[str, Any]) -> None:
    reply = (await ask(client, **form)).json()
    assert reply["choices"][0]["message"]["content"] == (
        (await ask(client, response_format=schema_format())).json()["choices"][0]["message"]["content"]
    )


@pytest.mark.parametrize("form", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}])
async def test_an_object_is_an_object(client: httpx.AsyncClient, form: dict[str, Any]) -> None:
    for seed in range(3):
        choice = (await ask(client, **form, temperature=2, seed=seed, max_tokens=400)).json()["choices"][0]
        assert choice["message"]["content"].startswith("{")
        assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)


@pytest.mark.parametrize("form", [{"guided_choice": COLORS}, {"structured_outputs": {"choice": COLORS}}])
async def test_a_choice_is_one_of_the_list(client: httpx.AsyncClient, form: dict[str, Any]) -> None:
    reply = (await ask(client, **form, n=8, temperature=2, seed=1)).json()
    said = {choice["message"]["content"] for choice in reply["choices"]}
    assert said <= {*COLORS} and len(said) > 1
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"stop"}
    text = await client.post("/v1/completions", json={"prompt": "The star is", **form})
    assert text.json()["choices"][0]["text"].lstrip() in COLORS


async def test_structured_and_free_answers_share_a_batch(client: httpx.AsyncClient, running: Engine) -> None:
    free = (await ask(client)).json()["choices"]
    forms: list[dict[str, Any]] = [{}, {"guided_choice": COLORS}, {"response_format": schema_format()}]
    replies = await asyncio.gather(*(ask(client, **form) for form in forms))
    assert replies[0].json()["choices"] == free
    assert replies[1].json()["choices"][0]["message"]["content"] in COLORS
    jsonschema.validate(json.loads(replies[2].json()["choices"][0]["message"]["content"]), SCHEMA)


def test_objects_that_list_their_properties_have_no_others() -> None:
    one, two = {"properties": {"a": {}}}, {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "string"}}
    shut = {**one, "additionalProperties": False}
    both = {"properties": {"x": one, "properties": two}, "$defs": {"d": one}, "items": [one], "enum": [one]}
    expected = {"properties": {"x": shut, "properties": two}, "$defs": {"d": shut}, "items": [shut], "enum": [one]}
    assert closed(both) == {**expected, "additionalProperties": False}
    for schema in (two, {"allOf": [one]}, {"type": "object"}, True):
        assert closed(schema) == schema


def test_sentencepiece_tokenizers_are_masked_too() -> None:
    """Their first token holds the blank behind the prompt."""
    vocabulary = {"<unk>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "\u2581red": 4, "star": 5, "red": 6, "\u2581star": 7}
    vocabulary["\u2581"] = 8
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    guidance = llguidance.hf.from_tokenizer(tokenizer, eos_token=[1])
    constraint = compile_grammar(guidance, choice_grammar(["red star", "\u00e9", "red"]), "guided_choice")
    steps = [({2, 4, 6, 8}, 4), ({1, 7, 8}, 7)]
    for allowed, token in steps:
        assert {*constraint.allowed(10).nonzero()[:, 0].tolist()} == allowed
        complete = constraint.take(token)
    assert complete


INHERITED = {
    "allOf": [{"$ref": "#/$defs/A"}, {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}],
    "$defs": {"A": {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}},
}
VARIANTS = {
    "type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"],
    "anyOf": [{"properties": {"b": {"type": "boolean"}}, "required": ["b"]}],
}  # fmt: skip


@pytest.mark.parametrize("schema", [INHERITED, VARIANTS], ids=["inherited", "variants"])
async def test_schemas_that_others_extend_stay_open(client: httpx.AsyncClient, schema: dict[str, Any]) -> None:
    reply = (await ask(client, guided_json=schema, max_tokens=200, temperature=1, seed=3)).json()
    choice = reply["choices"][0]
    assert choice["message"]["content"].startswith('{"') or choice["finish_reason"] == "length", reply


@pytest.mark.parametrize("pattern", [{"type": "string", "pattern": "a"}, {"type": "string", "format": "date"}])
def test_patterns_met_at_once_are_counted(pattern: dict[str, Any]) -> None:
    """Each further one doubles the time in which a schema is read. Those that never meet are free."""
    wide = {"properties": {f"p{i}": {"anyOf": [pattern, {"type": "null"}]} for i in range(50)}}
    check_schema(wide, "x")
    chain: dict[str, Any] = {}
    for _ in range(20):
        chain = {**pattern, "anyOf": [chain]}
    split = {"allOf": [{"properties": {"a": pattern}} for _ in range(20)]}
    linked = {"$ref": "#/$defs/d0", "$defs": {f"d{i}": {**pattern, "$ref": f"#/$defs/d{i + 1}"} for i in range(20)}}
    pairs = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    doubled = {"$ref": "#/$defs/d0", "$defs": pairs | {"d40": pattern}}
    for schema in ({"allOf": [pattern] * 20}, chain, split, linked, doubled):
        with pytest.raises(InvalidRequest, match="at most 12 patterns"):
            check_schema(schema, "x")
    check_schema({"$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}, "a": pattern}}}, "$ref": "#/$defs/n"}, "x")


@pytest.mark.parametrize("choice", ["\u007f", "\N{GRINNING FACE}", "\u2028\u0085x", "\\\"a\n"])
async def test_a_choice_may_hold_any_character(client: httpx.AsyncClient, choice: str) -> None:
    reply = (await ask(client, guided_choice=[choice])).json()
    assert reply["choices"][0]["message"]["content"] == choice


# ---- functions


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "paint"}}])
async def test_a_call_that_must_be(client: httpx.AsyncClient, choice: Any, stream: bool) -> None:
    names = set()
    for seed in range(6):
        response = await ask(client, tools=TOOLS, tool_choice=choice, temperature=2, seed=seed, stream=stream)
        message, reason = folded(events(response.text)) if stream else whole(response.json())
        (call,) = message["tool_calls"]
        names.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, PAINT["parameters"] if call["function"]["name"] == "paint" else {"maxProperties": 0})
        assert (message["content"], reason, call["type"]) == (None, "tool_calls", "function")
        assert call["id"].startswith("call_")
    assert names == ({"paint", "stop"} if choice == "required" else {"paint"})


def whole(reply: dict[str, Any]) -> tuple[dict[str, Any], str]:
    return reply["choices"][0]["message"], reply["choices"][0]["finish_reason"]


def folded(chunks: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """As OpenAI's client accumulates them."""
    calls: list[dict[str, Any]] = []
    content = None
    for chunk in chunks:
        delta = chunk["choices"][0]["delta"]
        content = delta.get("content") or content
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(calls):
                calls.append(json.loads(json.dumps(call)))
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {"content": content, "tool_calls": calls}, chunks[-1]["choices"][0]["finish_reason"]


async def test_functions_that_may_be_called_leave_the_model_its_words(client: httpx.AsyncClient) -> None:
    choice = (await ask(client, tools=TOOLS, max_tokens=5)).json()["choices"][0]
    assert "tool_calls" in choice["message"] or choice["message"]["content"]
    prompts = [(await ask(client, tools=TOOLS, tool_choice=how)).json()["usage"]["prompt_tokens"] for how in ("none", "auto")]
    assert prompts[1] > prompts[0], "the functions are described"


USE = ToolUse((Function(name="paint"), Function(name="stop")), required=False)
CALL = '{"name": "paint", "arguments": {"a": {"b": "}"}}}'


@pytest.mark.parametrize("step", [1, 3, 100])
def test_an_answer_shows_whether_it_is_a_call(step: int) -> None:
    for text, call in ((CALL, True), ("It is {red}", False), ("", False)):
        reader = AnswerReader(USE)
        deltas = [delta for i in range(0, len(text), step) for delta in reader.push(text[i : i + step])]
        rest, reason = reader.finish("stop")
        deltas += rest
        if call:
            assert deltas[0]["tool_calls"][0]["function"]["name"] == "paint"
            assert "".join(one["tool_calls"][0]["function"]["arguments"] for one in deltas) == '{"a": {"b": "}"}}'
        else:
            assert "".join(one["content"] for one in deltas) == text
        assert reason == ("tool_calls" if call else "stop")


@pytest.mark.parametrize("how", ["required", "auto", {"type": "function", "function": {"name": "paint"}}])
async def test_stops_cut_no_call(client: httpx.AsyncClient, running: Engine, how: Any) -> None:
    """`auto` is led to a call by the bias of its first token."""
    spell, (red,) = running.preprocessor.token_bytes, running.preprocessor.tokenize(" red", special=False)
    braces = [token for token in range(running.preprocessor.vocab_size) if spell(token).lstrip().startswith(b"{")]
    bias = dict.fromkeys(map(str, braces), 100) if how == "auto" else {}
    plain = {"tools": TOOLS, "tool_choice": how, "logit_bias": bias, "temperature": 1, "seed": 1}
    stops = {"stop": ["{", '"', ":", "r"], "stop_token_ids": [red]}
    calls = [(await ask(client, **plain, **more)).json()["choices"][0] for more in ({}, stops)]
    called = [choice["message"]["tool_calls"][0]["function"] for choice in calls]
    assert called[0] == called[1] and calls[1]["finish_reason"] == "tool_calls"
    json.loads(called[1]["arguments"])


async def test_stops_cut_a_text_beside_tools(client: httpx.AsyncClient) -> None:
    whole = (await ask(client, tools=TOOLS, max_tokens=6)).json()["choices"][0]["message"]["content"]
    cut = (await ask(client, tools=TOOLS, max_tokens=6, stop=whole[2:4])).json()["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(whole[2:4])] and cut["finish_reason"] == "stop"


def test_an_answer_cut_before_it_shows_its_call_is_told() -> None:
    reader = AnswerReader(USE)
    assert reader.push('{"name": "pa') == []
    assert reader.finish("length") == ([{"content": '{"name": "pa'}], "length")


def test_a_call_cut_short_keeps_all_it_had() -> None:
    reader = AnswerReader(USE)
    deltas = reader.push('{"name": "paint", "arguments": {"a": {}')
    rest, reason = reader.finish("length")
    assert reason == "length"
    assert "".join(one["tool_calls"][0]["function"]["arguments"] for one in [*deltas, *rest]) == '{"a": {}'


async def test_calls_and_their_results_are_turns(client: httpx.AsyncClient) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "paint", "arguments": '{"color": "red"}'}}
    history = [
        *body(image_part())["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "done"}]},
    ]
    silent = [{"role": "assistant", "content": None}, {"role": "user", "content": "And now?"}]
    for more in ([], silent[1:], silent):
        assert (await ask(client, messages=[*history, *more], tools=TOOLS)).status_code == 200


# ---- refusals

DEEP: dict[str, Any] = {"type": "object"}
for _ in range(50):
    DEEP = {"type": "object", "properties": {"x": DEEP}}
CHAIN = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(2000)}
HUGE = {"parameters": {"type": "object", "properties": {"a": {"enum": ["x" * 1000] * 50}}}}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"response_format": schema_format({"type": "foo"})}, "response_format"),
    "unknown keyword": ({"response_format": schema_format({"type": "array", "uniqueItems": True}, strict=True)}, "response_format"),
    "web reference": ({"guided_json": {"$ref": "http://example.com/schema"}}, "guided_json"),
    "endless reference": ({"guided_json": {"$ref": "#"}}, "guided_json"),
    "chain of references": ({"guided_json": {"$ref": "#/$defs/0", "$defs": CHAIN}}, "guided_json"),
    "nothing fits": ({"guided_json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "guided_json"),
    "no schema": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "a range that ends processes": ({"guided_json": {"type": "integer", "minimum": -(2**63), "maximum": -(2**63)}}, "guided_json"),
    "a large constant": ({"response_format": schema_format({"enum": [1234567890123456789]})}, "response_format"),
    "a function's large number": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"maximum": 1e300}}}]},
        "tools[0].function.parameters",
    ),
    "a tiny bound": ({"guided_json": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e-9}}, "guided_json"),
    "many patterns": ({"guided_json": {"allOf": [{"type": "string", "pattern": f"a{i}"} for i in range(40)]}}, "guided_json"),
    "huge together": ({"tools": [{"type": "function", "function": HUGE | {"name": f"f{i}"}} for i in range(2)]}, "tools"),
    "huge": ({"guided_json": {"enum": ["x" * 1000] * 100}}, "guided_json"),
    "explosive": (
        {"guided_json": {"allOf": [{"anyOf": [{"properties": {f"{x}{i}": {}}} for x in "pq"]} for i in range(18)]}}, "guided_json",
    ),
    "two forms": ({"guided_json": SCHEMA, "guided_choice": ["a"]}, "guided_choice"),
    "form and tools": ({"guided_json": SCHEMA, "tools": TOOLS}, "tools"),
    "regex": ({"structured_outputs": {"regex": "(a+)+"}}, "structured_outputs.regex"),
    "empty choice": ({"guided_choice": [""]}, "guided_choice[0]"),
    "tool choice alone": ({"tool_choice": "required"}, "tool_choice"),
    "unknown function": ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    "twins": ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
    "bad name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    "bad parameters": ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": 3}}}]}, "tools"),
    "endless": ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
async def test_what_cannot_be_kept_is_refused(client: httpx.AsyncClient, name: str) -> None:
    fields, param = BAD[name]
    started = time.process_time()
    error = check_error(await ask(client, **fields), 400)
    assert (error["param"] or error["message"]).startswith(param), error
    assert 10 < len(error["message"]) < 300 and "\n" not in error["message"] and "%json" not in error["message"]
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((a|b|c|d){1,50}){1,50}x$"},
        {"type": "string", "pattern": "(a|a)*(a|aa)+b{2,500}(.{0,500}x){0,200}"},
        {"type": "array", "minItems": 10**7, "items": {"type": "integer"}},
        {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
        DEEP,
    ],
)
async def test_a_costly_schema_costs_little(client: httpx.AsyncClient, schema: dict[str, Any]) -> None:
    started = time.process_time()
    await ask(client, guided_json=schema, max_tokens=50)
    assert time.process_time() - started < 5
    assert (await ask(client)).status_code == 200


EMPTY: list[dict[str, Any]] = [{"tools": []}, {"response_format": {}}, {"guided_choice": []}, {"response_format": {"type": "text"}}]


@pytest.mark.parametrize("empty", EMPTY)
async def test_empty_forms_ask_for_nothing(client: httpx.AsyncClient, empty: dict[str, Any]) -> None:
    assert (await ask(client, **empty)).json()["choices"] == (await ask(client)).json()["choices"]


async def test_an_empty_schema_is_any_json_by_every_name(client: httpx.AsyncClient) -> None:
    any_json: dict[str, Any] = {}
    forms = ({"structured_outputs": {"json": any_json}}, {"guided_json": any_json}, {"response_format": schema_format(any_json)})
    said = {(await ask(client, **form)).json()["choices"][0]["message"]["content"] for form in forms}
    content = [{"type": "input_image", "image_url": PICTURE}, {"type": "input_text", "text": QUESTION}]
    asked = {"text": {"format": {"type": "json_schema", "name": "any", "schema": {}}}, "max_output_tokens": 200}
    reply = await client.post("/v1/responses", json={"input": [{"role": "user", "content": content}], **asked})
    said.add(reply.json()["output"][0]["content"][0]["text"])
    assert len(said) == 1 and (await ask(client)).json()["choices"][0]["message"]["content"] not in said


async def test_a_schema_too_wide_to_follow_is_a_400(client: httpx.AsyncClient) -> None:
    """That shows within the answer, when the parser stops; it is no failure of the server's."""
    wide = {f"p{i}": {"type": "integer", "minimum": i, "maximum": 10**9 + i} for i in range(800)}
    error = check_error(await ask(client, guided_json={"type": "object", "properties": wide}), 400)
    assert "too large to be followed" in error["message"]
    assert (await ask(client, guided_json=SCHEMA)).status_code == 200
