"""The routes. What a question means is in `chat`, what a picture may be in `media`, what can go wrong in `errors`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import asdict
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from server.access import Access, ApiKey, check_levels
from server.admin import add_admin
from server.chat import read_chat, read_vqa
from server.completions import completion_events, completion_reply, detokenize, read_completion, tokenize
from server.deadline import in_time, read_deadline
from server.envelope import Envelope
from server.errors import EspalierError, NotReady, ShuttingDown, UnknownPath
from server.estimate import estimate
from server.forms import read_form
from server.logs import fields
from server.openapi import ANSWERS, MODELS, OPERATIONS, PLAIN_TEXT, REFUSALS, TOKENS, add_documentation, takes
from server.page import add_playground
from server.reading import SHORT, Reading, read_body
from server.replies import AnswerStream, Chunk, chat_events, chat_reply, fold, prepend, vqa_reply
from server.request import PreparedRequest
from server.responses import read_response, response_events, whole_response
from server.schema_parts import ModelName
from server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponsesRequest,
    TokenizeRequest,
    VqaRequest,
    invalid,
)
from server.served import Served
from server.settings import Settings
from server.version import version

if TYPE_CHECKING:
    from server.engine import Engine

log = logging.getLogger(__name__)
T = TypeVar("T")
Whole = Callable[[dict[str, Any], PreparedRequest], dict[str, Any]]
"""A chat's whole reply in the form of a route."""
Events = Callable[[AsyncIterator[Chunk], PreparedRequest], AsyncIterator[str]]
"""A chat's chunks as the server-sent events of a route."""


def create_app(served: Served, settings: Settings, keys: Sequence[ApiKey]) -> FastAPI:
    """The HTTP side of engines, which the caller starts and stops. Without keys anybody may ask."""
    app = FastAPI(
        title="Espalier", version=version(), description="Ask about pictures; say how much of the model to run.", docs_url=None,
        redoc_url=None, responses=REFUSALS, openapi_tags=[{"name": name} for name in (ANSWERS, TOKENS, MODELS, OPERATIONS)],
    )  # fmt: skip
    check_levels(keys, [engine.menu for engine in served.engines.values()])
    app.add_middleware(Access, settings=settings, keys=keys, metrics=served.metrics)
    if settings.cors_origins:
        exposed = ["X-Request-Id", "X-Pruning-Level", "X-Pruning-Visual-Tokens", "X-Pruning-Layers", "Server-Timing", "Retry-After"]
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
        )
    app.add_middleware(Envelope, settings=settings)
    _add_error_handlers(app, served)
    _add_questions(app, served, settings)
    _add_menu(app, served)
    _add_operations(app, served)
    add_admin(app, served)
    add_documentation(app, served)
    add_playground(app)
    return app


def _add_questions(app: FastAPI, served: Served, settings: Settings) -> None:
    reading = Reading(settings.max_batch + settings.max_queue)

    async def answer(
        request: Request, read: Callable[[], PreparedRequest], whole: Whole = chat_reply, stream: Events = chat_events,
        pictures: bool = True,
    ) -> Response:  # fmt: skip
        arrived = time.monotonic()
        served.check_room()
        deadline = read_deadline(request.headers, arrived)

        async def work() -> Response:
            prepared = await reading.run(read, pictures=pictures)
            try:
                answer = AnswerStream(in_time(prepared, deadline), arrived)
            except ShuttingDown:
                if served.serves(prepared.engine):
                    raise
                # Its name has gone to another checkpoint since it was read, and with it tokens and pictures.
                prepared = await reading.run(read, pictures=pictures)
                answer = AnswerStream(in_time(prepared, deadline), arrived)
            return await reply(answer, prepared, whole, stream)

        return await unless_gone(request, work())

    @app.post("/v1/chat/completions", tags=[ANSWERS], openapi_extra=takes(ChatRequest, "/v1/chat/completions", stream=True))
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completions. Header `X-Pruning-Level`, field `pruning.level` or model `name@level` set the level."""
        body, level = await read_body(request), request.headers.get("x-pruning-level")
        return await answer(request, lambda: read_chat(served, settings, body, level), pictures=may_hold_pictures(body))

    @app.post("/v1/completions", tags=[ANSWERS], openapi_extra=takes(CompletionRequest, "/v1/completions", stream=True))
    async def completions(request: Request) -> Response:
        """OpenAI's older completions: a text in, its continuation out. The level is set as for chat completions."""
        body, level = await read_body(request), request.headers.get("x-pruning-level")
        return await answer(
            request, lambda: read_completion(served, settings, body, level), completion_reply, completion_events,
            pictures=may_hold_pictures(body),
        )  # fmt: skip

    @app.post("/v1/responses", tags=[ANSWERS], openapi_extra=takes(ResponsesRequest, "/v1/responses", stream=True))
    async def responses(request: Request) -> Response:
        """OpenAI's responses, without state: each request holds its whole chat. The level is set as for chat completions."""
        body, level = await read_body(request), request.headers.get("x-pruning-level")
        return await answer(
            request, lambda: read_response(served, settings, body, level), whole_response, response_events,
            pictures=may_hold_pictures(body),
        )  # fmt: skip

    @app.post("/v1/pruning/estimate", tags=[MODELS], openapi_extra=takes(ChatRequest, "/v1/pruning/estimate"))
    async def estimates(request: Request) -> dict[str, Any]:
        """What this chat would cost at each level: tokens, FLOPs, seconds by the server's present pace. Nothing is run."""
        body = await read_body(request)
        return await reading.run(lambda: estimate(served, settings, body), pictures=may_hold_pictures(body))

    @app.post("/v1/vqa", tags=[ANSWERS], openapi_extra=takes(VqaRequest, "/v1/vqa", form=True))
    async def vqa(request: Request) -> Response:
        """One question about one or several pictures, as a form with files or as JSON."""
        body, level = await read_body(request), request.headers.get("x-pruning-level")
        kind = request.headers.get("content-type", "")
        is_form = kind.lower().startswith("multipart/form-data")

        def read() -> PreparedRequest:
            return read_vqa(served, settings, read_form(kind, body, settings) if is_form else body, level)

        return await answer(request, read, vqa_reply)

    @app.post("/tokenize", tags=[TOKENS], openapi_extra=takes(TokenizeRequest, "/tokenize"))
    async def tokens(request: Request) -> dict[str, Any]:
        """The tokens of a text, or of a chat with each image as its visual tokens before pruning."""
        body = await read_body(request)
        return await reading.run(lambda: tokenize(served, settings, body), pictures=may_hold_pictures(body))

    @app.post("/detokenize", tags=[TOKENS], openapi_extra=takes(DetokenizeRequest, "/detokenize"))
    async def text(request: Request) -> dict[str, str]:
        """The text of tokens."""
        body = await read_body(request)
        return await reading.run(lambda: detokenize(served, body), pictures=may_hold_pictures(body))


def _add_menu(app: FastAPI, served: Served) -> None:
    def card(name: str, engine: Engine, level: str) -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": engine.created, "owned_by": "espalier"}
        pruning = {"level": level, "card": engine.menu[level].card}
        return {**about, "context_length": engine.context_length, "pruning": pruning}

    @app.get("/v1/models", tags=[MODELS])
    async def models() -> dict[str, Any]:
        """Each served model, by its name and by one alias per level."""
        return {"object": "list", "data": [card(name, *meant) for name, meant in served.names().items()]}

    @app.get("/v1/models/{model_id:path}", tags=[MODELS])
    async def model(model_id: ModelName) -> dict[str, Any]:
        if model_id not in (names := served.names()):
            raise served.unknown(model_id)
        return card(model_id, *names[model_id])

    @app.get("/v1/pruning/levels", tags=[MODELS])
    async def levels(model: str | None = None) -> dict[str, Any]:
        """A model's menu, with what each level was measured to do. One with several operating points chooses among them by
        question. Without a name, that of the first model."""
        engine = served.pick(model).engine
        menu = [asdict(level) for level in engine.menu.values()]
        return {"object": "list", "default": engine.default_level, "data": menu}


def _add_operations(app: FastAPI, served: Served) -> None:
    @app.get("/live", tags=[OPERATIONS])
    async def live() -> dict[str, str]:
        """Restart the server when this is 503: an engine's thread is gone."""
        if not served.alive:
            raise NotReady("The engine has stopped.")
        return {"status": "live"}

    @app.get("/health", tags=[OPERATIONS])
    @app.get("/ready", tags=[OPERATIONS])
    async def ready() -> dict[str, str]:
        """Send requests elsewhere while this is 503."""
        if not served.ready:
            raise NotReady("The server is starting or shutting down.")
        return {"status": "ready"}

    @app.get("/version", tags=[OPERATIONS])
    async def version() -> dict[str, Any]:
        first, models = served.first, {name: engine.fingerprint for name, engine in served.engines.items()}
        return {"version": app.version, "model": first.model_name, "fingerprint": first.fingerprint, "models": models}

    @app.get("/metrics", tags=[OPERATIONS], response_class=Response, openapi_extra=PLAIN_TEXT)
    def metrics() -> Response:
        return Response(generate_latest(served.metrics), headers={"Content-Type": CONTENT_TYPE_LATEST})


def may_hold_pictures(body: bytes) -> bool:
    """Which lane a request takes is a guess by its bytes: enough to keep short texts moving, and nothing to trust."""
    return len(body) > SHORT or b"image" in body


# ---- a question's answer


async def reply(answer: AnswerStream, prepared: PreparedRequest, whole: Whole, events: Events) -> Response:
    """`events` of the chunks as soon as their headers are known, or `whole` of the whole reply."""
    if prepared.stream:
        return await _start_stream(answer, prepared, events)
    try:
        return JSONResponse(whole(await fold(answer.chunks()), prepared), headers=answer.headers())
    finally:
        answer.abort()


async def _start_stream(answer: AnswerStream, prepared: PreparedRequest, events: Events) -> Response:
    chunks = answer.chunks()
    try:
        while not (first := await anext(chunks)):
            pass  # silence before the headers, which nothing can fill
    except BaseException:
        answer.abort()
        raise
    return EventStream(answer, events(prepend(first, chunks), prepared))


class EventStream(StreamingResponse):
    """Server-sent events of an answer, which is freed however the stream ends."""

    def __init__(self, answer: AnswerStream, events: Any) -> None:
        unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=answer.headers() | unbuffered, media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.abort()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; cancel it and raise ClientDisconnect when the client hangs up. The body must have been read."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


# ---- errors


def _add_error_handlers(app: FastAPI, served: Served) -> None:
    async def refuse(request: Request, error: Exception) -> Response:
        refusal = _unknown_path(app, request) if getattr(error, "status_code", None) == 404 else _as_ours(error)
        # Probes and look-ups are no work refused, and a failure is the engine's to count.
        if request.method == "POST" and refusal.status != 500:
            served.metrics.rejected(refusal.code or refusal.type)
            reason, where = refusal.code or refusal.type, request.scope["path"][:100]
            told = fields(path=where, status=refusal.status, reason=reason, param=refusal.param)
            log.info("refused POST %r: %d %s, param %r", where, refusal.status, reason, refusal.param, extra=told)
        theirs = error.headers if isinstance(error, HTTPException) else None
        return JSONResponse(refusal.body(), refusal.status, headers={**(theirs or {}), **refusal.headers()})

    async def hung_up(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it; the name is nginx's

    for kind in (EspalierError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, refuse)
    app.add_exception_handler(ClientDisconnect, hung_up)


def _unknown_path(app: FastAPI, request: Request) -> UnknownPath:
    routes = ", ".join(f"{' '.join(route.methods or ())} {route.path}" for route in app.routes if isinstance(route, APIRoute))
    return UnknownPath(f"There is no {request.scope['path'][:100]} here. This server has: {routes}.")


def _as_ours(error: Exception) -> EspalierError:
    if isinstance(error, EspalierError):
        return error
    if isinstance(error, RequestValidationError):
        return invalid(error.errors())
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    refusal = EspalierError(error.detail, code=phrase.lower().replace(" ", "_"))
    refusal.status, refusal.type = error.status_code, "invalid_request_error"
    return refusal
