"""The bodies that clients send, as types. Unknown fields are tolerated, for clients send many; wrong types never are, nor known
fields that would change the answer and are not obeyed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from server.errors import InvalidRequest
from server.json_text import parse_json
from server.refused import UNSUPPORTED, Refusing
from server.request import Sampling
from server.schema_items import FunctionTool, Items, NamedFunctionTool, TextOptions
from server.schema_parts import (
    Body,
    Choices,
    LevelName,
    Message,
    ModelName,
    NamedTool,
    ResponseFormat,
    StructuredOutputs,
    TokenId,
    Tool,
    may_be_null,
)
from server.settings import MODEL_NAME
from server.tools import ToolUse

MAX_INT64 = 2**63 - 1
MAX_DETAIL_IMAGES = 4
"""Most images whose tokens a receipt lists one by one: about 100 kB of JSON for four of 576 tokens."""

STRUCTURED = {"response_format", "structured_outputs", "guided_choice", "tools", "tool_choice"}
"""Fields whose empty values ask for nothing, where a body has them. An empty schema is any JSON."""


class PruningOptions(Body):
    model_config = ConfigDict(extra="forbid")

    level: LevelName | None = Field(None, description="A name from `GET /v1/pruning/levels`.")
    escalate_below: float | None = Field(
        None, ge=0, le=1,
        description="Make an answer that is less sure than this again at the fullest level; the receipt then has `escalated`. How "
        "sure it is: the probability of its choice, of yes against no, or of its tokens together.",
    )  # fmt: skip
    meet_deadline: bool | None = Field(
        None,
        description="Where the level asked for would miss the deadline that the request's headers set, run at the fullest one that "
        "makes it; the receipt's `reason` is then `deadline`.",
    )
    detail: bool | None = Field(
        None,
        description="Tell the route in full, as `pruning.detail` of the reply or of the stream's last chunk with a choice, for up "
        f"to {MAX_DETAIL_IMAGES} images: `kept_tokens` (ascending, numbered over all images, each row by row), `token_sizes` (how "
        "many each kept one stands for), `merged_into` (by the number kept at an operating point: for each token the kept one that "
        "stands for it), `token_scores` (logarithm of the attention the router foresees; null without one), `layers` by kind "
        "(`run`, `frozen`, `skipped`), `operating_points` (`visual_tokens`, `layers`, `flops_ratio`, `expected_agreement`, "
        "`chosen`), `center_crop` (whether the tokens cover the middle square of a picture, or all of it), `tiled` (whether they "
        "cover its tiles too) and `seconds` by stage.",
    )


class StreamOptions(Body):
    include_usage: bool = Field(False, description="End the stream with a chunk that holds the usage.")


def _many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


# The cap on a stop string bounds the search for half-seen ones at every step.
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Stop = Annotated[list[StopString] | None, BeforeValidator(_many, json_schema_input_type=str | list[str] | None)]


def _bias(value: Any) -> Any:
    """JSON's keys are text."""
    if not isinstance(value, dict) or not all(str(token).isdecimal() and len(str(token)) < 10 for token in value):
        raise ValueError("must map token ids to numbers from -100 to 100")
    return {int(token): bias for token, bias in value.items()}


Bias = Annotated[float, Field(ge=-100, le=100)]
BiasByText = Annotated[dict[str, Bias], Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}})]
LogitBias = Annotated[dict[int, Bias] | None, BeforeValidator(_bias, json_schema_input_type=BiasByText | None)]
Picture = Annotated[str, Field(min_length=1, json_schema_extra={"format": "data-url"})]
Images = Annotated[list[bytes | str], Field(fail_fast=True), BeforeValidator(_many, json_schema_input_type=Picture | list[Picture])]


class Generation(Refusing):
    """What every endpoint lets a client say about the answer. A null means the default, as it does for OpenAI."""

    level_field: ClassVar[str] = "pruning.level"
    """Where the body says its level."""

    model: ModelName | None = Field(None, description="The served model, or `model@level`.")
    max_tokens: int | None = Field(None, ge=1, description="Length limit of the answer; the server has a default.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of `max_tokens`; wins over it.")
    temperature: float | None = Field(
        None, ge=0, le=2, description="0, the default, is greedy: a question about a picture has one best answer."
    )
    top_p: float | None = Field(None, ge=0, le=1, description="Draw from the best tokens of this mass; 0 takes the best one.")
    top_k: int | None = Field(None, ge=-1, description="Draw from so many best tokens; 0 or -1 for all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Draw from tokens of this share of the best one's probability.")
    seed: int | None = Field(None, ge=-MAX_INT64, le=MAX_INT64)
    stop: Stop = Field(None, max_length=4)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, description="Divides the logits of tokens seen before.")
    logit_bias: LogitBias = Field(None, max_length=1024, fail_fast=True, description="By token id, what is added to its logit.")
    min_tokens: int | None = Field(None, ge=0, description="No end and no stop before so many tokens.")
    ignore_eos: bool | None = Field(None, description="Go on when the model ends its answer.")
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=64, fail_fast=True, description="End at these tokens, which are not shown."
    )

    def sampling(self, default_max_tokens: int) -> Sampling:
        same = {
            "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty", "repetition_penalty",
            "min_tokens", "ignore_eos",
        }  # fmt: skip
        return Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens or default_max_tokens,
            stop=tuple(self.stop or ()),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=tuple((self.logit_bias or {}).items()),
            **self.model_dump(include=same, exclude_none=True),
        )


AnyTool = TypeVar("AnyTool", Tool, FunctionTool)
AnyChoice = TypeVar("AnyChoice", bound=str | NamedTool | NamedFunctionTool | None)
Tools = Annotated[list[AnyTool], Field(max_length=128, fail_fast=True)]
ToolChoice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class Form:
    """What `field` of a body asks the answer to be: JSON that fits a schema, or one of some choices."""

    field: str
    schema: dict[str, Any] | None = None
    strict: bool = True
    choices: tuple[str, ...] = ()


class StreamedRequest(Generation):
    """What OpenAI's endpoints share beyond that."""

    stream: bool | None = None
    pruning: PruningOptions | None = Field(None, description="How much of the model to run.")

    def forms(self) -> list[Form]:
        """What the answer is asked to be, by field."""
        return []

    def continues(self) -> bool:
        """Whether the prompt ends within the answer, whose leading blanks are then its own."""
        return False


class ToolUser(Body):
    """Bodies whose fields `tools` and `tool_choice` name the functions that an answer may or must call."""

    @field_validator("tools", check_fields=False)
    @classmethod
    def _are_different(cls, value: list[AnyTool] | None) -> list[AnyTool] | None:
        names = [tool.function.name for tool in value or ()]
        if len(names) != len(set(names)):
            raise ValueError("two functions have one name")
        return value

    @field_validator("tool_choice", check_fields=False)
    @classmethod
    def _is_a_tool(cls, value: AnyChoice, info: ValidationInfo) -> AnyChoice:
        names = {tool.function.name for tool in info.data.get("tools") or ()}
        if isinstance(value, NamedTool | NamedFunctionTool) and value.function.name not in names:
            raise ValueError("names no function of `tools`")
        if value == "required" and not names:
            raise ValueError("requires `tools`")
        return value

    def tool_use(self) -> ToolUse | None:
        """The functions that the answer may or must call; None for none."""
        tools: Sequence[Tool | FunctionTool] = getattr(self, "tools", None) or ()
        choice: str | NamedTool | NamedFunctionTool | None = getattr(self, "tool_choice", None)
        if not tools or choice == "none":
            return None
        functions = tuple(tool.function for tool in tools)
        if choice is None or isinstance(choice, str):
            return ToolUse(functions, required=choice == "required")
        return ToolUse(tuple(one for one in functions if one.name == choice.function.name), required=True)


def _may_be_empty(schema: dict[str, Any]) -> None:
    """As `_empty_asks_nothing` takes it."""
    may_be_null(schema)
    for name in STRUCTURED & schema["properties"].keys():
        schema["properties"][name]["anyOf"].append({"enum": [[], {}, ""]})


class OpenAIRequest(StreamedRequest):
    """What OpenAI's two older endpoints share beyond that."""

    model_config = ConfigDict(json_schema_extra=_may_be_empty)

    n: int | None = Field(None, ge=1, le=8, description="Answers to draw for the same question.")
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = Field(None, description="JSON, or JSON that fits a schema.")
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's: one of `choice`, `json`, `json_object`.")
    guided_choice: Choices | None = Field(None, description="vLLM's: the answer is one of these.")
    guided_json: dict[str, Any] | None = Field(None, description="vLLM's: the answer is JSON that fits this schema.")

    @model_validator(mode="before")
    @classmethod
    def _empty_asks_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if name not in STRUCTURED or value not in ([], {}, "")}

    @model_validator(mode="after")
    def _ends_by_itself(self) -> OpenAIRequest:
        if self.forms() and (self.ignore_eos or self.min_tokens):
            raise ValueError("ignore_eos and min_tokens exclude structured answers, which end by themselves")
        return self

    def forms(self) -> list[Form]:
        """What the answer is asked to be, by field."""
        asked, outputs = [], self.structured_outputs or StructuredOutputs.model_validate({})
        if ((format := self.response_format) and format.type == "json_object") or outputs.json_object:
            asked.append(Form("response_format" if format else "structured_outputs", schema={"type": "object"}))
        if format and format.json_schema:
            strict = bool(format.json_schema.strict)
            asked.append(Form("response_format", schema=format.json_schema.json_schema, strict=strict))
        for field, schema in (("structured_outputs.json", outputs.json_), ("guided_json", self.guided_json)):
            asked += [Form(field, schema=schema)] if schema is not None else []
        for field, choices in (("structured_outputs.choice", outputs.choice), ("guided_choice", self.guided_choice)):
            asked += [Form(field, choices=tuple(choices))] if choices else []
        return asked


class ChatRequest(OpenAIRequest, ToolUser):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1024, fail_fast=True)
    add_generation_prompt: bool | None = Field(None, description="Let the assistant's turn begin; the default.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message, the assistant's own.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives per token; requires `logprobs`.")
    tools: Tools[Tool] | None = Field(None, description="Functions that the model may call, one an answer.")
    tool_choice: ToolChoice | NamedTool | None = Field(None, description="`auto` is the default.")
    parallel_tool_calls: bool | None = Field(None, description="Taken, and no matter: an answer makes one call.")

    @field_validator("continue_final_message")
    @classmethod
    def _continues_an_answer(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        messages = info.data.get("messages")
        if value and messages and messages[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's")
        if value and info.data.get("add_generation_prompt"):
            raise ValueError("excludes `add_generation_prompt: true`")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("requires `logprobs: true`")
        return value

    def continues(self) -> bool:
        return bool(self.continue_final_message)

    def sampling(self, default_max_tokens: int) -> Sampling:
        alternatives = (self.top_logprobs or 0) if self.logprobs else None
        return replace(super().sampling(default_max_tokens), logprobs=alternatives)


def _one_prompt(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]  # a batch of one, as some clients always send
    if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)):
        return value
    raise ValueError("must be one text, or the list of its tokens; send several one by one")


OnePrompt = str | Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
BatchOfOne = Annotated[list[OnePrompt], Field(min_length=1, max_length=1, fail_fast=True)]
Prompt = Annotated[str | list[int], BeforeValidator(_one_prompt, json_schema_input_type=OnePrompt | BatchOfOne)]


class CompletionRequest(OpenAIRequest):
    """`POST /v1/completions`: a text, or its tokens, to go on with."""

    misplaced: ClassVar[dict[str, str]] = {
        "level": "pruning.level", "max_output_tokens": "max_tokens", "input": "prompt",
        "messages": "prompt, or ask at /v1/chat/completions",
    }  # fmt: skip

    prompt: Prompt
    logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives per token.")
    add_special_tokens: bool | None = Field(None, description="Begin the prompt as the model's prompts begin; the default.")

    def continues(self) -> bool:
        return True

    def sampling(self, default_max_tokens: int) -> Sampling:
        return replace(super().sampling(default_max_tokens), logprobs=self.logprobs)


class ResponsesRequest(StreamedRequest, ToolUser):
    """`POST /v1/responses`, without state: nothing is stored, so each request holds its whole chat."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        **UNSUPPORTED, "background": (), "conversation": (), "previous_response_id": (), "prompt": (),
        "reasoning": ({"effort": "none"}, {"effort": None}), "truncation": ("disabled",),
    }  # fmt: skip
    misplaced: ClassVar[dict[str, str]] = {
        "level": "pruning.level", "messages": "input", "question": "input", "image": "input_image parts of input",
        "images": "input_image parts of input",
    }  # fmt: skip

    input: Items = Field(min_length=1, max_length=1024)
    instructions: str | None = Field(None, description="Stands before the chat, as the system's words.")
    max_output_tokens: int | None = Field(None, ge=1, description="Length limit of the answer; the server has a default.")
    text: TextOptions | None = Field(None, description="JSON, or JSON that fits a schema.")
    tools: Tools[FunctionTool] | None = Field(None, description="Functions that the model may call, one an answer.")
    tool_choice: ToolChoice | NamedFunctionTool | None = Field(None, description="`auto` is the default.")
    parallel_tool_calls: bool | None = Field(None, description="Taken, and no matter: an answer makes one call.")
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = Field(None, fail_fast=True)
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Alternatives per token.")
    store: bool | None = Field(None, description="Taken, and nothing is stored: the reply says false.")
    metadata: dict[str, str] | None = Field(None, fail_fast=True, description="Comes back with the reply.")

    def forms(self) -> list[Form]:
        format = self.text and self.text.format
        if not format or format.type == "text":
            return []
        schema = {"type": "object"} if format.type == "json_object" else format.json_schema
        return [Form("text.format", schema=schema, strict=format.strict)]

    def sampling(self, default_max_tokens: int) -> Sampling:
        sampling = super().sampling(default_max_tokens)
        most = self.max_output_tokens or sampling.max_tokens
        asked = "message.output_text.logprobs" in (self.include or ()) or self.top_logprobs
        return replace(sampling, max_tokens=most, logprobs=(self.top_logprobs or 0) if asked else None)


def _text_or_chat(schema: dict[str, Any]) -> None:
    may_be_null(schema)
    null, fields = {"type": "null"}, ("prompt", "messages")
    schema["oneOf"] = [
        {"properties": {one: {"not": null}, other: null}, "required": [one]} for one, other in (fields, fields[::-1])
    ]


class TokenizeRequest(Refusing, ToolUser):
    """`POST /tokenize`: a text or a chat."""

    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "chat_template": (), "chat_template_kwargs": (), "media_io_kwargs": (), "mm_processor_kwargs": (),
    }  # fmt: skip
    misplaced: ClassVar[dict[str, str]] = {}
    model_config = ConfigDict(json_schema_extra=_text_or_chat)

    model: ModelName | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=1024, fail_fast=True)
    add_special_tokens: bool | None = Field(None, description="Begin a text as the model's prompts begin; a chat always does.")
    add_generation_prompt: bool | None = Field(None, description="Let the assistant's turn begin; the default.")
    continue_final_message: bool | None = Field(None, description="End within the last message.")
    return_token_strs: bool | None = None
    tools: Tools[Tool] | None = Field(None, description="Of a chat: functions that the model is told of.")
    tool_choice: ToolChoice | NamedTool | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        if self.tools and self.messages is None:
            raise ValueError("tools go with messages")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: ModelName | None = None
    tokens: list[TokenId] = Field(fail_fast=True)


class VqaRequest(Generation):
    """`POST /v1/vqa`: pictures and a question. In a form the pictures are files, in JSON base64 or data URLs."""

    misplaced: ClassVar[dict[str, str]] = {
        "pruning": "level", "pruning.level": "level", "detail": "level", "max_output_tokens": "max_tokens", "images": "image",
        "messages": "question", "input": "question", "prompt": "question", "text": "question",
    }  # fmt: skip
    level_field = "level"

    image: Images = Field(min_length=1)
    question: str = Field(json_schema_extra={"pattern": r"\S"})
    level: LevelName | None = Field(None, description="A name from `GET /v1/pruning/levels`.")


class ModelRequest(Body):
    """`POST /v1/admin/models`."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        pattern=f"^{MODEL_NAME}$", max_length=100, description="What clients call it. A name in use goes to the new checkpoint."
    )
    checkpoint: str = Field(min_length=1, description="A directory on the server, or the name of a shipped checkpoint.")


AnyBody = TypeVar("AnyBody", bound=Body)
PART_KINDS = {"text", "image_url", "input_text", "input_image", "output_text", "message", "function_call", "function_call_output"}
TRIED = re.compile(r"(literal|list|dict)\[|str$|Named(Function)?Tool$")


def parse(model: type[AnyBody], body: bytes | Mapping[str, Any]) -> AnyBody:
    """Read a JSON body, or a form's fields, whose numbers are text. Raises InvalidRequest that names the first fault."""
    try:
        if isinstance(body, bytes):
            return parse_json(body, model.model_validate_json)
        return model.model_validate(body, strict=False)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from None


def invalid(errors: Sequence[Any]) -> InvalidRequest:
    """What pydantic found wrong, as our own refusal. Its messages do not quote what the client sent, so they are short."""
    first = errors[0]
    param = _path(first["loc"])
    message = "is not known here" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
    return InvalidRequest(f"{param}: {message}" if param else message, param=param or None)


def _path(loc: Sequence[int | str]) -> str:
    """("messages", 0, "content", 1, "text", "text") → messages[0].content[1].text

    Pydantic writes the kind of a part, or which of several types it tried, before its fields.
    """
    path = ""
    for before, step in zip([None, *loc], loc, strict=False):
        if isinstance(step, int):
            path += f"[{step}]"
        elif not (isinstance(before, int) and step in PART_KINDS) and not TRIED.match(step):
            path += f".{step[:100]}" if path else step[:100]
    return path
