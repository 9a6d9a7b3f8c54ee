"""What the bodies of `schemas` are made of: messages and their parts, functions, and forms of answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator, model_validator


def may_be_null(schema: dict[str, Any]) -> None:
    """Every field that may be left out may be null."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, json_schema_extra=may_be_null)

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


# What they may be is the running server's to say: see `openapi`.
ModelName = Annotated[str, WithJsonSchema({"$ref": "#/components/schemas/Model"})]
LevelName = Annotated[str, WithJsonSchema({"$ref": "#/components/schemas/Level"})]
TokenId = Annotated[int, Field(ge=0), WithJsonSchema({"$ref": "#/components/schemas/Token"})]
PictureUrl = Annotated[
    str,
    Field(
        description="A base64 data URL of a JPEG, PNG, WebP, GIF or AVIF picture. Other URLs are fetched only from hosts that the "
        "operator named.",
        json_schema_extra={"format": "data-url"},
    ),
]
Detail = Literal["auto", "low", "high", "original"]


class ImageUrl(Body):
    url: PictureUrl
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
    image_url: Annotated[ImageUrl, BeforeValidator(_url, json_schema_input_type=PictureUrl | ImageUrl)]


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Content = Annotated[list[Part], Field(fail_fast=True), BeforeValidator(_parts, json_schema_input_type=str | list[Part])]


FunctionName = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]


class CalledFunction(Body):
    name: FunctionName
    arguments: str = Field(description="JSON.")


class AssistantCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


def _content_of_others(schema: dict[str, Any]) -> None:
    """Only the assistant's turn may be without content."""
    may_be_null(schema)
    others = {"role": {"enum": ["system", "developer", "user", "tool"]}, "content": {"not": {"type": "null"}}}
    schema["anyOf"] = [
        {"properties": {"role": {"const": "assistant"}}}, {"properties": others, "required": ["content"]},
    ]


class Message(Body):
    model_config = ConfigDict(json_schema_extra=_content_of_others)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Content, Field(max_length=1024)] | None = Field(None, validate_default=True)
    tool_calls: list[AssistantCall] | None = Field(
        None, max_length=128, fail_fast=True, description="Of the assistant: functions it called."
    )
    tool_call_id: str | None = Field(None, description="Of a tool: the call that this is the result of.")

    @model_validator(mode="before")
    @classmethod
    def _has_no_older_call(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("function_call"):
            raise ValueError("function_call: is not supported here; send tool_calls")
        return values

    @field_validator("content")
    @classmethod
    def _has_content(cls, value: list[Part] | None, info: ValidationInfo) -> list[Part] | None:
        if value is None and info.data.get("role") != "assistant":
            raise ValueError("Field required")
        return value


class JsonSchema(Body):
    json_schema: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool = Field(False, description="Refuse a schema with keywords that cannot be kept, instead of ignoring these.")


def schema_by_type(schema: dict[str, Any]) -> None:
    """A schema goes with type `json_schema`, and with no other."""
    may_be_null(schema)
    field = next(name for name in schema["properties"] if name.endswith("schema"))
    null, other = {"type": "null"}, {"enum": ["text", "json_object", None]}
    schema["anyOf"] = [
        {"properties": {"type": {"const": "json_schema"}, field: {"not": null}}, "required": ["type", field]},
        {"properties": {"type": other, field: null}},
    ]


class ResponseFormat(Body):
    model_config = ConfigDict(json_schema_extra=schema_by_type)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` goes with type `json_schema`")
        return self


Choices = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(min_length=1, max_length=128, fail_fast=True)]


class StructuredOutputs(Body):
    """vLLM's form; its regular expressions and grammars are not taken."""

    model_config = ConfigDict(extra="forbid")

    choice: Choices | None = None
    json_: dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None


class Function(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of the arguments; none takes none.")
    strict: bool | None = Field(None, description="Refuse a schema with keywords that cannot be kept, instead of ignoring these.")


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction
