"""What travels between the HTTP side and the engine: a request in, events out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from models.preprocess import Picture
from server.caller import CALLER, Caller
from server.errors import EspalierError
from server.route_detail import RouteDetail

if TYPE_CHECKING:
    from server.deadline import Deadline
    from server.engine import Engine
    from server.structured import Constraint
    from server.tools import ToolUse

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when to stop. Temperature 0 is greedy; `top_k` 0 or -1 is all; `logit_bias` is by token id; no
    end and no stop comes before `min_tokens`; `logprobs` is how many alternatives to report, None for none at all."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logprobs: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PreparedImage:
    """A picture ready for the vision tower, and the digest that caches are keyed by."""

    picture: Picture
    digest: str


@dataclass(frozen=True)
class Escalated:
    """A first answer that was not sure enough: the level that it ran at, how sure it was, what it said and in how many tokens."""

    level: str
    confidence: float | None
    answer: str
    completion_tokens: int


@dataclass(frozen=True)
class Receipt:
    """What a reply says about its own route."""

    level: str
    reason: str
    visual_tokens: int
    visual_tokens_total: int
    layers: int
    layers_total: int
    flops_ratio: float
    checkpoint: str
    frozen_layers: int = 0  # of those that run, in how many visual tokens are frozen
    expected_agreement: float | None = None  # probability that the answer is the un-pruned model's, where a router chose
    detail: RouteDetail | None = None  # where the request asked for it
    probabilities: dict[str, float] | None = None  # of each choice, or of yes and no
    confidence: float | None = None  # the answer's own among them; of other answers, where it was asked for, its tokens'
    escalated: Escalated | None = None  # the first answer, where this one is the second


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability. `bytes` are what it adds to the content; `top` are the likeliest tokens in its place."""

    token: str
    logprob: float
    bytes: bytes
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Started:
    """The first event: the route is made and prefill is done. `timings` are seconds per stage."""

    receipt: Receipt
    timings: dict[str, float]


@dataclass(frozen=True)
class Delta:
    """More text and the logprobs of its tokens. What is half seen, a character or a stop string, waits for the rest."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The last event of an answered request. `timings` are seconds per stage: queue, image, encode, route, prefill, decode."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    receipt: Receipt
    timings: dict[str, float]
    cached_tokens: int = 0
    """Of the prompt, that were not run again."""


@dataclass(frozen=True)
class Failed:
    """The last event of a request that the engine could not answer; other requests go on. `refusal` where that was no failure."""

    message: str
    refusal: EspalierError | None = None


Event = Started | Delta | Finished | Failed


@dataclass
class ParentRequest:
    """A client's request, which `choices` answers share: what is counted once whatever their number. The engine's thread alone
    writes here; the parent of answers that were refused while they waited is never complete, and has not ended.
    """

    choices: int = 1
    model: str = ""  # as the client wrote it
    caller: Caller = field(default_factory=CALLER.get)
    ended: int = 0
    routed: bool = False
    first_token: float | None = None  # time.monotonic()
    new_tokens: int = 0
    outcome: str = "stop"
    """The worst of its answers so far; see `server.metrics.OUTCOMES`."""


@dataclass
class Request:
    """One answer to make. `prompt` holds each image's token `visual_tokens` times over; `emit` is called on the engine's thread."""

    id: str
    prompt: list[int]
    images: list[PreparedImage]
    level: str
    sampling: Sampling
    emit: Callable[[Event], None]
    reason: str = "default"  # where the level came from: header, body, alias, detail, default, load or deadline
    follow_up: bool = False  # the question follows an answer in its chat
    continues: bool = False  # leading blanks are the answer's own: it goes on with a text, or its choices have some
    detail: bool = False  # the receipt tells the route in full
    constraint: Constraint | None = None  # what the answer must be
    tools: ToolUse | None = None  # functions that it may call; no stop string or token cuts a call
    choices: tuple[str, ...] = ()  # of which the answer is one: their probabilities are told
    confidence: bool = False  # of any answer, tell how sure it is
    withheld: bool = False  # who reads it may keep it from the client, and says by `Engine.told` when that had its answers
    deadline: Deadline | None = None
    timings: dict[str, float] = field(default_factory=dict)
    created: float = field(default_factory=time.monotonic)
    parent: ParentRequest = field(default_factory=ParentRequest)


@dataclass(frozen=True)
class PreparedRequest:
    """One POST, parsed, tokenised and decoded: what its `n` engine requests share, and the engine that they are for. `model` is as
    the client wrote it; `follow_up` says whether an answer stands before the question, `continues` whether leading blanks are the
    answer's own, as where the prompt ends within it."""

    engine: Engine
    id: str
    model: str
    prompt: list[int]
    images: list[PreparedImage]
    image_seconds: float
    level: str
    reason: str
    sampling: Sampling
    follow_up: bool = False
    continues: bool = False
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    detail: bool = False
    constraint: Constraint | None = None
    tools: ToolUse | None = None
    choices: tuple[str, ...] = ()
    escalate_below: float | None = None
    deadline: Deadline | None = None
    meet_deadline: bool = False  # at a cheaper level, if need be
    echo: Mapping[str, Any] = field(default_factory=dict)  # what the reply repeats of the body
