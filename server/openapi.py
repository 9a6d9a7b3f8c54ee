"""The OpenAPI document, and the page at `/docs` that shows it: Swagger UI, whose files come with fastapi-offline."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import fastapi_offline
from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import FileResponse

from server import deadline
from server.page import HEADERS, PLAYGROUND, PlaygroundFiles
from server.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ModelRequest,
    ResponsesRequest,
    TokenizeRequest,
    VqaRequest,
)
from server.served import Served

SWAGGER = Path(fastapi_offline.__file__).parent / "static"
BODIES = (ChatRequest, CompletionRequest, ResponsesRequest, VqaRequest, TokenizeRequest, DetokenizeRequest, ModelRequest)
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAACAAAAAgCAIAAAD8GO2jAAAAKklEQVR42u3NMQEAAAQAMATRP5QwSvBtBZbTHZ8q"
    "ngkEAoFAIBAIBIIrC9KAAVhVsgYjAAAAAElFTkSuQmCC"
)
"""A red square."""
QUESTION = "What color is the picture?"
CHAT = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PICTURE}}, {"type": "text", "text": QUESTION}]}]
INPUT = [{"role": "user", "content": [{"type": "input_image", "image_url": PICTURE}, {"type": "input_text", "text": QUESTION}]}]
EXAMPLES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "picture": {"messages": CHAT, "max_tokens": 16},
        "stream": {"messages": CHAT, "max_tokens": 16, "stream": True, "stream_options": {"include_usage": True}},
        "level": {"messages": CHAT, "max_tokens": 16, "pruning": {"level": "light"}},
        "choice": {"messages": CHAT, "structured_outputs": {"choice": ["red", "blue"]}},
    },
    "/v1/completions": {"text": {"prompt": "A red star is", "max_tokens": 8}},
    "/v1/responses": {
        "picture": {"input": INPUT, "max_output_tokens": 16},
        "text": {"input": "What is red?", "max_output_tokens": 8},
    },
    "/v1/pruning/estimate": {"picture": {"messages": CHAT, "max_tokens": 16}},
    "/v1/vqa": {"picture": {"image": PICTURE, "question": QUESTION, "max_tokens": 16}},
    "/tokenize": {"text": {"prompt": "What is red?"}, "chat": {"messages": CHAT}},
    "/detokenize": {"tokens": {"tokens": [1, 2, 3]}},
}
"""Bodies that a server answers, by route and name."""

class ErrorObject(BaseModel):
    """OpenAI's. `param` is the field at fault, `code` a stable reason."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: ErrorObject


REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "Refused: the message says how to mend the request, or when to come back."},
    "5XX": {"model": ErrorReply, "description": "The server cannot answer."},
}
"""What each route may answer beside its own reply."""
LEVEL = {"$ref": "#/components/schemas/Level"}
MILLISECONDS = {"type": "integer", "minimum": 1, "maximum": deadline.MAX_MS}
HEADERS_OF_ANSWERS = [
    {"name": name, "in": "header", "required": False, "schema": schema, "description": text}
    for name, schema, text in (
        ("X-Pruning-Level", LEVEL, "Wins over the level that the body names."),
        (deadline.ANSWER, MILLISECONDS, "From the request's arrival to the answer's end; what would be late is a 429 at once."),
        (deadline.FIRST_TOKEN, MILLISECONDS, "The same to the answer's first token."),
    )
]
ANSWERS, TOKENS, MODELS, OPERATIONS = "Answers", "Tokens", "Models and levels", "Operations"
"""The headings of `/docs`, in this order."""
PLAIN_TEXT = {"responses": {"200": {"content": {"text/plain": {"schema": {"type": "string"}}}}}}


def takes(body: type[BaseModel], path: str, *, form: bool = False, stream: bool = False) -> dict[str, Any]:
    """For a route that reads its body itself, off the event loop: that body, and what may come back."""
    examples = {name: {"value": value} for name, value in EXAMPLES.get(path, {}).items()}
    content: dict[str, Any] = {
        "application/json": {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}, "examples": examples}
    }
    if form:
        image = {"type": "array", "minItems": 1, "items": {"type": "string", "format": "binary"}}
        fields = {"image": image, "question": {"type": "string", "pattern": r"\S"}, "level": LEVEL}
        schema = {"type": "object", "required": ["image", "question"], "properties": fields}
        content["multipart/form-data"] = {"schema": schema, "encoding": {"image": {"contentType": "image/png"}}}
    replies: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if stream:
        replies["text/event-stream"] = {}
    return {
        "parameters": HEADERS_OF_ANSWERS if stream or form else [],
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "The answer, whole or streamed." if stream else "The answer.", "content": replies}},
    }


@cache
def _bodies() -> dict[str, Any]:
    """The schemas of all bodies and their parts, by name."""
    _, bodies = models_json_schema([(body, "validation") for body in BODIES], ref_template="#/components/schemas/{model}")
    return dict(bodies["$defs"])


def add_documentation(app: FastAPI, served: Served) -> None:
    """`/openapi.json` and `/docs`, for all routes that the app has by the time it is asked."""
    generic = app.openapi

    def document() -> dict[str, Any]:
        engines = served.engines.values()
        smallest = min(engine.preprocessor.vocab_size for engine in engines)
        schemas = generic().setdefault("components", {}).setdefault("schemas", {})
        schemas.update(_bodies())
        schemas["Level"] = {"type": "string", "enum": [*dict.fromkeys(level for engine in engines for level in engine.menu)]}
        schemas["Model"] = {"type": "string", "enum": list(served.names())}
        schemas["Token"] = {"type": "integer", "minimum": 0, "maximum": smallest - 1}
        return generic()

    app.openapi = document  # type: ignore[method-assign]
    app.mount("/playground/swagger", PlaygroundFiles(directory=SWAGGER), name="swagger")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PLAYGROUND / "docs.html", headers=HEADERS)
