"""The bodies that clients send, as types. Unknown fields are tolerated, for clients send many; wrong types never are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from server.errors import InvalidRequest
from server.request import Sampling

MAX_INT64 = 2**63 - 1


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


Detail = Literal["auto", "low", "high", "original"]


class ImageUrl(Body):
    url: str = Field(description="A base64 data URL of a JPEG, PNG or WebP picture. Other URLs are not fetched.")
    detail: Detail = Field(
        "auto", description="`low` asks for level `strong`, `high` and `original` for `off`, unless the request names a level."
    )


def _url(image: Any) -> Any:
    return {"url": image} if isinstance(image, str) else image


class TextPart(Body):
    type: Literal["text"]
    text: str


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_url, json_schema_input_type=str | ImageUrl)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Content = Annotated[list[Part], BeforeValidator(_parts, json_schema_input_type=str | list[Part])]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Content = Field(max_length=1024)


class PruningOptions(Body):
    level: str | None = Field(None, description="A name from `GET /v1/pruning/levels`.")


class StreamOptions(Body):
    include_usage: bool = Field(False, description="End the stream with a chunk that holds the usage.")


def _many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# The cap on a stop string bounds the search for half-seen ones at every step.
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[list[StopString] | None, BeforeValidator(_many, json_schema_input_type=str | list[str] | None)]
Images = Annotated[list[str | bytes], BeforeValidator(_many, json_schema_input_type=str | list[str])]


class Generation(Body):
    """What both endpoints let a client say about the answer. A null means the default, as it does for OpenAI."""

    model: str | None = Field(None, description="The served model, or `model@level`.")
    max_tokens: int | None = Field(None, ge=1, description="Length limit of the answer; the server has a default.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of `max_tokens`; wins over it.")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0, the default, is greedy: a question about a picture has one best answer."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, description="Draw from so many best tokens; 0 for all.")
    seed: int | None = Field(None, ge=-MAX_INT64, le=MAX_INT64)
    stop: Stop = Field(None, max_length=4)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)

    def sampling(self, default_max_tokens: int) -> Sampling:
        same = {"temperature", "top_p", "top_k", "seed", "frequency_penalty", "presence_penalty"}
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens or default_max_tokens,
            stop=tuple(self.stop or ()),
            **self.model_dump(include=same, exclude_none=True),
        )


class OpenAIRequest(Generation):
    """What OpenAI's two endpoints share beyond that."""

    n: int | None = Field(None, ge=1, le=8, description="Answers to draw for the same question.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    pruning: PruningOptions | None = Field(None, description="How much of the model to run.")


class ChatRequest(OpenAIRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1024)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives per token; requires `logprobs`.")

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("requires `logprobs: true`")
        return value

    def sampling(self, default_max_tokens: int) -> Sampling:
        alternatives = (self.top_logprobs or 0) if self.logprobs else None
        return replace(super().sampling(default_max_tokens), logprobs=alternatives)


class CompletionRequest(OpenAIRequest):
    """`POST /v1/completions`: a text, or its tokens, to go on with."""

    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives per token.")
    echo: bool | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)):
            return value
        raise ValueError("must be one text, or the list of its tokens")

    @field_validator("echo")
    @classmethod
    def _no_echo(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("is not supported: the reply holds the continuation alone")
        return value

    def sampling(self, default_max_tokens: int) -> Sampling:
        return replace(super().sampling(default_max_tokens), logprobs=self.logprobs)


class TokenizeRequest(Body):
    """`POST /tokenize`: a text or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=1024)
    add_special_tokens: bool | None = Field(None, description="Begin a text as the model's prompts begin; a chat always does.")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]


class VqaRequest(Generation):
    """`POST /v1/vqa`: pictures and a question. In a form the pictures are files, in JSON base64 or data URLs."""

    image: Images = Field(min_length=1)
    question: str
    level: str | None = Field(None, description="A name from `GET /v1/pruning/levels`.")


AnyBody = TypeVar("AnyBody", bound=Body)


def parse(model: type[AnyBody], body: bytes | Mapping[str, Any]) -> AnyBody:
    """Read a JSON body, or a form's fields, whose numbers are text. Raises InvalidRequest that names the first fault."""
    try:
        if isinstance(body, bytes):
            return model.model_validate_json(body)
        return model.model_validate(body, strict=False)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from None


def invalid(errors: Sequence[Any]) -> InvalidRequest:
    """What pydantic found wrong, as our own refusal. Its messages do not quote what the client sent, so they are short."""
    first = errors[0]
    param = _path(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {message}" if param else message, param=param or None)


def _path(loc: Sequence[int | str]) -> str:
    """("messages", 0, "content", 1, "text", "text") → messages[0].content[1].text

    Pydantic writes a part's kind before its fields; each kind has one field of that name, so doubles are dropped.
    """
    path = ""
    for before, step in zip([None, *loc], loc, strict=False):
        if isinstance(step, int):
            path += f"[{step}]"
        elif step != before:
            path += f".{step}" if path else step
    return path
