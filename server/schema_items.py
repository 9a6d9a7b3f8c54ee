"""What the body of `/v1/responses` is made of: items, their parts, functions, and forms of answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from server.schema_parts import Body, Detail, Function, FunctionName, Message, PictureUrl, schema_by_type


class InputText(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputImage(Body):
    type: Literal["input_image"]
    image_url: PictureUrl
    detail: Detail = Field("auto", description="As for chat completions.")


def _input_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]
InputContent = Annotated[
    list[InputPart],
    Field(max_length=1024, fail_fast=True),
    BeforeValidator(_input_parts, json_schema_input_type=str | list[InputPart]),
]


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent

    def as_message(self) -> Message:
        return Message.model_validate({"role": self.role, "content": _chat_parts(self.content)})


class FunctionCallItem(Body):
    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str = Field(description="JSON.")

    def as_message(self) -> Message:
        call = {"id": self.call_id, "function": {"name": self.name, "arguments": self.arguments}}
        return Message.model_validate({"role": "assistant", "tool_calls": [call]})


class FunctionOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: InputContent

    def as_message(self) -> Message:
        return Message.model_validate({"role": "tool", "content": _chat_parts(self.output)})


def _chat_parts(parts: list[InputPart]) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail}}
        if isinstance(part, InputImage) else {"type": "text", "text": part.text} for part in parts
    ]  # fmt: skip


Item = Annotated[InputMessage | FunctionCallItem | FunctionOutputItem, Field(discriminator="type")]


def _items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        return value
    return [{**item, "type": item.get("type") or "message"} if isinstance(item, dict) else item for item in value]


Question = Annotated[str, Field(pattern=r"\S")]
Items = Annotated[list[Item], Field(fail_fast=True), BeforeValidator(_items, json_schema_input_type=Question | list[Item])]


class TextFormat(Body):
    model_config = ConfigDict(json_schema_extra=schema_by_type)

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(None, description="Of the schema; comes back with the reply, as does `description`.")
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool = Field(False, description="Refuse a schema with keywords that cannot be kept, instead of ignoring these.")

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`schema` goes with type `json_schema`")
        return self


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class FunctionTool(Function):
    type: Literal["function"]

    @property
    def function(self) -> Function:
        """As in the body of chat completions, where it is a part."""
        return self

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") != "function":
            raise ValueError("only tools of type `function` are known here")
        return values


class NamedFunctionTool(Body):
    type: Literal["function"]
    name: str

    @property
    def function(self) -> NamedFunctionTool:
        """As in the body of chat completions, where it is a part."""
        return self
