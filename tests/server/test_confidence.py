"""Probabilities of choices, of yes and no, and of answers; and second answers where the first is not sure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from models.forward import decode_input, forward, prefill_input
from server import confidence
from server.confidence import ChoiceScorer, YesNo
from server.engine import Engine
from server.errors import Overloaded
from server.request import Failed, Request
from server.structured import choice_grammar, compile_grammar
from tests.server.client import app_of, ask, body, events, image_part
from tests.server.client import client as client  # fixtures
from tests.server.client import engine as engine
from tests.server.fake_engine import FakeEngine
from tests.server.tiny import ask as request_for
from tests.server.tiny import drain, new_engine, total, value
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint

pytestmark = pytest.mark.anyio
CHOICES = ("red", "red star", "redder", "blue", "a blue one")


@pytest.fixture(name="real")
def real_engine(tiny: Any) -> Engine:
    return new_engine(tiny)


def choose(engine: Engine, choices: Sequence[str] = CHOICES, **options: Any) -> Any:
    constraint = compile_grammar(engine.grammar_tokenizer, choice_grammar(choices), "choice")
    request = replace(request_for(engine, **options), choices=tuple(choices), constraint=constraint, confidence=True)
    engine.submit(request)
    drain(engine)
    return request.emit.finished.receipt, request.emit.text


@pytest.mark.parametrize("level", ["off", "thin"])
def test_choices_get_what_sampling_would_give_them(real: Engine, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the tree of all ways to spell a choice, each token drawn from those that are allowed."""
    rough, text = choose(real, level=level)
    monkeypatch.setattr(confidence, "MAX_PASSES", 10_000)
    receipt, _ = choose(real, level=level)
    exact = dict.fromkeys(CHOICES, 0.0)
    request = request_for(real, level=level)
    features = [real.model.encode(image.picture.pixels, image.picture.layout) for image in request.images]
    plan = real.planner.plan(level, "body", request.prompt, features)

    def logits_behind(tokens: Sequence[int]) -> Tensor:
        cache = real.model.new_cache(plan.route.rows(len(request.prompt), len(tokens) + 1))
        logits = forward(real.model, [prefill_input(real.model, torch.tensor(request.prompt), plan.visual, plan.route, cache)])
        for place, token in enumerate(tokens, len(request.prompt)):
            logits = forward(real.model, [decode_input(real.model, torch.tensor([token]), place, plan.route, cache)])
        return logits[0]

    def walk(tokens: tuple[int, ...], mass: float, constraint: Any) -> None:
        logits = logits_behind(tokens)
        allowed = constraint.allowed(len(logits))
        own = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
        for token in allowed.nonzero()[:, 0].tolist():
            after, part = constraint.copy(), mass * float(own[token])
            if after.take(token):
                ended = token in real.checkpoint.eos
                spelled = b"".join(map(real.preprocessor.token_bytes, tokens if ended else (*tokens, token)))
                exact[spelled.decode().lstrip()] += part
            elif part > 1e-4:
                walk((*tokens, token), part, after)

    walk((), 1.0, compile_grammar(real.grammar_tokenizer, choice_grammar(CHOICES), "choice"))
    assert receipt.probabilities == pytest.approx(exact, abs=0.02)
    assert rough.probabilities == pytest.approx(exact, abs=0.1), "this model spells as it likes"
    assert sum(receipt.probabilities.values()) == pytest.approx(1, abs=1e-3)
    assert receipt.confidence == receipt.probabilities[text]


def test_telling_probabilities_changes_no_answer(real: Engine) -> None:
    constraint = compile_grammar(real.grammar_tokenizer, choice_grammar(CHOICES), "choice")
    plain = replace(request_for(real), constraint=constraint)
    real.submit(plain)
    drain(real)
    assert choose(real)[1] == plain.emit.text
    assert plain.emit.finished.receipt.probabilities is None


def test_many_choices_that_begin_alike_cost_few_passes(real: Engine) -> None:
    passes = []

    def follow(tokens: Sequence[int]) -> Tensor:
        passes.append(len(tokens))
        return torch.zeros(real.preprocessor.vocab_size)

    choices = [f"star {a}{b}{c}" for a in "abcd" for b in "abcd" for c in "abcd"]
    constraint = compile_grammar(real.grammar_tokenizer, choice_grammar(choices), "choice")
    scorer = ChoiceScorer(choices, real.checkpoint.eos, real.preprocessor.token_bytes, follow, 20)
    parts = scorer.score(torch.zeros(real.preprocessor.vocab_size), constraint)
    assert sum(passes) <= confidence.MAX_PASSES
    assert sum(parts.values()) == pytest.approx(1, abs=0.01) and min(parts.values()) > 0


@pytest.mark.parametrize("choices", [(" red", " blue"), (" red", "blue"), ("\n", "x"), ("  a", "b")])
async def test_leading_blanks_of_a_choice_are_its_own(real: Engine, choices: tuple[str, ...]) -> None:
    real.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(real)), base_url="http://x") as client:
            for seed in range(4):
                fields = {"guided_choice": choices, "model": None, "temperature": 2, "seed": seed}
                reply = (await ask(client, body(image_part(), **fields))).json()
                said = reply["choices"][0]["message"]["content"]
                assert said in choices
                assert reply["pruning"]["confidence"] == reply["pruning"]["probabilities"][said]
    finally:
        real.stop()


def test_a_token_that_cuts_a_choice_is_none_of_it(real: Engine) -> None:
    cut = real.preprocessor.tokenize(" red", special=False)
    receipt, _ = choose(real, stop_token_ids=(*cut,))
    assert receipt.probabilities is None or sum(receipt.probabilities.values()) == pytest.approx(1, abs=1e-3)


def test_yes_and_no_are_known_in_any_spelling(real: Engine) -> None:
    words = [b"Yes", b" yes", b"no", b"YES", b"none", b"</s>"]
    score = YesNo(len(words), words.__getitem__).score
    logits = torch.tensor([0.3, 0.2, 0.4, 0.1, 0.0, 0.0]).log()
    assert score(logits, 1) == pytest.approx({"yes": 0.6, "no": 0.4})
    assert score(logits, 2) == pytest.approx({"yes": 0.6, "no": 0.4})
    assert score(logits, 4) is None


def test_any_answer_has_a_confidence_where_it_is_asked_for(real: Engine) -> None:
    request = replace(request_for(real, logprobs=0), confidence=True)
    real.submit(request)
    drain(real)
    expected = math.exp(sum(one.logprob for one in request.emit.logprobs))
    assert request.emit.finished.receipt.confidence == pytest.approx(expected, abs=1e-3)
    assert request.emit.finished.receipt.probabilities is None


# ---- second answers


@pytest.fixture(autouse=True)
def unsure(engine: FakeEngine) -> Iterator[None]:
    engine.confidence = {"strong": 0.55, "off": 0.9}
    yield


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unsure_answer_is_made_again_in_full(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    fields = {"pruning": {"level": "strong", "escalate_below": 0.7}, "stream": stream, "n": 2}
    response = await ask(client, body(image_part(), **fields))
    receipt = events(response.text)[-1]["pruning"] if stream else response.json()["pruning"]
    assert (receipt["level"], receipt["confidence"]) == ("off", 0.9)
    assert receipt["escalated"] == {"level": "strong", "confidence": 0.55, "answer": "A red star.", "completion_tokens": 4}
    assert response.headers["x-pruning-level"] == "off"
    assert [request.level for request in engine.submitted] == ["strong"] * 2 + ["off"] * 2
    assert len({request.id for request in engine.submitted}) == 4
    if not stream:
        assert [choice["message"]["content"] for choice in response.json()["choices"]] == ["A red star."] * 2
        assert response.json()["usage"]["completion_tokens"] == 8
    counted = {"from": "strong", "to": "off"}
    assert engine.metrics.registry.get_sample_value("espalier_escalations_total", counted) == 2


@pytest.mark.parametrize(
    "pruning", [{"level": "strong", "escalate_below": 0.5}, {"level": "strong"}, {"level": "off", "escalate_below": 1}]
)
async def test_a_sure_answer_stays(client: httpx.AsyncClient, engine: FakeEngine, pruning: dict[str, Any]) -> None:
    reply = (await ask(client, body(image_part(), pruning=pruning))).json()
    assert "escalated" not in reply["pruning"] and reply["pruning"]["level"] == pruning["level"]
    assert len(engine.submitted) == 1


async def test_without_a_place_the_first_answer_stays(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusals = [None, Overloaded("The queue is full.", 1)]
    reply = (await ask(client, body(image_part(), pruning={"level": "strong", "escalate_below": 0.7}))).json()
    assert reply["pruning"]["level"] == "strong" and reply["choices"][0]["message"]["content"] == "A red star."
    assert "escalated" not in reply["pruning"]


async def test_where_the_second_answer_fails_the_first_stays(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failures = {"off": Failed("This request failed.")}
    reply = (await ask(client, body(image_part(), pruning={"level": "strong", "escalate_below": 0.7}))).json()
    assert reply["pruning"]["level"] == "strong" and reply["choices"][0]["message"]["content"] == "A red star."
    assert [request.level for request in engine.submitted] == ["strong", "off"]


@pytest.mark.parametrize(("below", "level"), [(1, "off"), (0, "strong")])
async def test_times_are_those_that_the_client_saw(real: Engine, below: float, level: str) -> None:
    """Of one answer, whose first token comes when the first answer has ended."""
    real.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(real)), base_url="http://x") as client:
            pruning = {"level": "strong", "escalate_below": below}
            reply = (await ask(client, body(image_part(), model=None, max_tokens=4, pruning=pruning))).json()
    finally:
        real.stop()
    assert reply["pruning"]["level"] == level
    for name in ("time_to_first_token_seconds", "request_seconds"):
        assert total(real, f"{name}_count") == value(real, f"{name}_count", level=level) == 1
    waited = value(real, "time_to_first_token_seconds_sum", level=level)
    assert waited > value(real, "inter_token_seconds_sum", level="strong") > 0
    assert value(real, "request_seconds_sum", level=level) >= waited


async def test_a_deadline_is_that_of_the_first_answer(real: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[Request] = []
    submit = real.submit
    monkeypatch.setattr(real, "submit", lambda request: (submitted.append(request), submit(request)))
    real.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(real)), base_url="http://x") as client:
            asked = body(image_part(), model=None, max_tokens=4, pruning={"level": "strong", "escalate_below": 1})
            assert (await ask(client, asked, headers={"X-Request-Deadline-Ms": "60000"})).status_code == 200
    finally:
        real.stop()
    assert [request.deadline is None for request in submitted] == [False, True]


async def test_a_failed_first_answer_is_a_failure(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = Failed("This request failed."), 2
    response = await ask(client, body(image_part(), pruning={"level": "strong", "escalate_below": 0.7}))
    assert response.status_code == 500 and len(engine.submitted) == 1


async def test_over_http_a_choice_tells_its_probabilities(real: Engine) -> None:
    real.start()
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(real)), base_url="http://x") as client:
            fields = {"guided_choice": ["yes", "no"], "pruning": {"level": "strong", "escalate_below": 1}, "model": None}
            reply = (await ask(client, body(image_part(), **fields))).json()
    finally:
        real.stop()
    receipt = reply["pruning"]
    assert receipt["level"] == "off" and receipt["escalated"]["level"] == "strong"
    assert receipt["escalated"]["answer"] in ("yes", "no")
    assert receipt["probabilities"].keys() == {"yes", "no"}
    assert receipt["confidence"] == receipt["probabilities"][reply["choices"][0]["message"]["content"]]
