"""OpenAI's messages to a prepared request: prompt, pictures, sampling, level. What comes back is in `replies`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from server import media
from server.errors import ContextTooLong, EspalierError, InvalidRequest, PayloadTooLarge, UnknownLevel, UnknownModel
from server.request import PreparedImage, PreparedRequest
from server.schema_parts import ImagePart, ImageUrl, Message, NamedTool
from server.schemas import (
    MAX_DETAIL_IMAGES,
    ChatRequest,
    Form,
    Generation,
    OpenAIRequest,
    TokenizeRequest,
    VqaRequest,
    parse,
)
from server.settings import Settings
from server.structured import Constraint, choice_grammar, compile_grammar, schema_grammar
from server.tools import ToolUse, call_text

if TYPE_CHECKING:
    from server.engine import Engine

DETAIL_LEVELS = {"low": "strong", "high": "off", "original": "off"}
TURN_OF = {"developer": "system", "tool": "user"}
"""The role in the chat's template of those that it does not know."""
CHARS_PER_TOKEN = 64
"""More characters than this per token of context cannot fit, so they are refused before they are tokenised."""

Turn = dict[str, Any]
ImageSource = tuple[str, str | bytes]
"""A picture's place in the body, for error messages, and its data URL or file."""


# ---- reading: heavy, so it runs in a worker thread


def read_chat(engine: Engine, settings: Settings, body: bytes, header: str | None) -> PreparedRequest:
    """A chat body to a prepared request; `header` is X-Pruning-Level. Raises a 4xx of `server.errors` for anything wrong in it."""
    request = parse(ChatRequest, body)
    turns, images = conversation(request.messages)
    tools = tool_use(request)
    if tools:
        turns = told(turns, tools.prompt())
    level = request.pruning.level if request.pruning else None
    detail = hinted_level(engine, [image.detail for _, image in images])
    sources: list[ImageSource] = [(place, image.url) for place, image in images]
    # The menu first: what is refused for its level costs no decoding.
    prepared = prepare(engine, settings, request, [], header=header, body=level, detail=detail, tools=tools)
    if prepared.detail and len(images) > MAX_DETAIL_IMAGES:
        raise InvalidRequest(f"pruning.detail: for at most {MAX_DETAIL_IMAGES} images, not {len(images)}", param="pruning.detail")
    return _with_turns(engine, settings, prepared, turns, sources, **turn_options(request))


def read_vqa(engine: Engine, settings: Settings, body: bytes | Mapping[str, Any], header: str | None) -> PreparedRequest:
    """A JSON body or a form's fields to a prepared request; see `read_chat`."""
    request = parse(VqaRequest, body)
    if not request.question.strip():
        raise InvalidRequest("question: must not be empty", param="question")
    content = [*({"type": "image"} for _ in request.image), {"type": "text", "text": request.question}]
    sources = [(f"image[{i}]", _data_url(image)) for i, image in enumerate(request.image)]
    turns = [{"role": "user", "content": content}]
    prepared = prepare(engine, settings, request, [], header=header, body=request.level)
    return _with_turns(engine, settings, prepared, turns, sources)


def turn_options(request: ChatRequest | TokenizeRequest) -> dict[str, bool]:
    """How the chat's template ends."""
    continued = bool(request.continue_final_message)
    return {"continued": continued, "generation": request.add_generation_prompt is not False and not continued}


def _with_turns(
    engine: Engine, settings: Settings, prepared: PreparedRequest, turns: list[Turn], sources: list[ImageSource],
    **template: bool,
) -> PreparedRequest:  # fmt: skip
    start = time.perf_counter()
    prompt, images = prompt_and_images(engine, settings, turns, sources, **template)
    seconds = time.perf_counter() - start
    follow_up = any(turn["role"] == "assistant" for turn in turns)
    continues = template.get("continued", False)
    return replace(
        prepared, prompt=prompt, images=images, image_seconds=seconds, follow_up=follow_up, continues=continues
    )


def prepare(
    engine: Engine, settings: Settings, request: Generation, prompt: list[int],
    *, header: str | None, body: str | None, detail: str | None = None, kind: str = "chatcmpl", tools: ToolUse | None = None,
) -> PreparedRequest:  # fmt: skip
    """What a request says beside its prompt: model, level, sampling, form of the reply."""
    model, alias = split_model(engine, request.model)
    level, reason = choose_level(engine, header=header, body=body, alias=alias, detail=detail)
    sampling = request.sampling(settings.default_max_tokens)
    check_tokens(engine, sampling.stop_token_ids, "stop_token_ids")
    check_tokens(engine, [token for token, _ in sampling.logit_bias], "logit_bias")
    prepared = PreparedRequest(f"{kind}-{uuid4().hex}", model, prompt, [], 0.0, level, reason, sampling)
    if not isinstance(request, OpenAIRequest):
        return prepared
    usage = bool(request.stream_options and request.stream_options.include_usage)
    detailed = bool(request.pruning and request.pruning.detail)
    constraint = _constraint(engine, request.forms(), tools)
    return replace(
        prepared, n=request.n or 1, stream=bool(request.stream), include_usage=usage, detail=detailed, constraint=constraint,
        tools=tools,
    )  # fmt: skip


def _constraint(engine: Engine, forms: Sequence[Form], tools: ToolUse | None) -> Constraint | None:
    """What the answer must be. Raises InvalidRequest for a schema that cannot be kept, and for more than one form."""
    fields = [*(form.field for form in forms), *(["tools"] if tools else [])]
    if len(fields) > 1:
        raise InvalidRequest(f"{fields[1]}: an answer has one form; leave out {fields[0]} or {fields[1]}", param=fields[1])
    if tools:
        return compile_grammar(engine.grammar_tokenizer, tools.grammar(), "tools")
    for form in forms:
        if form.schema is None:
            return compile_grammar(engine.grammar_tokenizer, choice_grammar(form.choices), form.field)
        grammar = schema_grammar(form.schema, form.field, strict=form.strict)
        return compile_grammar(engine.grammar_tokenizer, grammar, form.field)
    return None


def tool_use(request: ChatRequest) -> ToolUse | None:
    """The functions that the answer may or must call; None for none."""
    functions, choice = tuple(tool.function for tool in request.tools or ()), request.tool_choice
    if not functions or choice == "none":
        return None
    if isinstance(choice, NamedTool):
        return ToolUse(tuple(one for one in functions if one.name == choice.function.name), required=True)
    return ToolUse(functions, required=choice == "required")


def told(turns: list[Turn], text: str) -> list[Turn]:
    """The turns with a text at the end of the system's, which is made where there is none."""
    if not text:
        return turns
    part = {"type": "text", "text": text}
    if turns[0]["role"] == "system":
        first = turns[0]["content"]
        return [{"role": "system", "content": [*first, *([{"type": "text", "text": "\n\n"}] if first else []), part]}, *turns[1:]]
    return [{"role": "system", "content": [part]}, *turns]


def _data_url(image: str | bytes) -> str | bytes:
    """Bare base64 is allowed here; it holds no colon, and every URL does."""
    return image if isinstance(image, bytes) or ":" in image else f"data:;base64,{image}"


def conversation(messages: Sequence[Message]) -> tuple[list[Turn], list[tuple[str, ImageUrl]]]:
    """Messages in the format of chat templates, and their images in order, each with its place in the body.

    Chat templates of LLaVA know no functions: a call stands in the assistant's turn as it would write it, its result in the user's.
    """
    turns: list[Turn] = []
    images: list[tuple[str, ImageUrl]] = []
    asked = False
    for i, message in enumerate(messages):
        content: list[dict[str, str]] = []
        for j, part in enumerate(message.content or ()):
            place = f"messages[{i}].content[{j}]"
            if not isinstance(part, ImagePart):
                content.append({"type": "text", "text": part.text})
            elif message.role == "user":
                content.append({"type": "image"})
                images.append((f"{place}.image_url.url", part.image_url))
            else:
                raise InvalidRequest(f"{place}: only user messages may hold images", param=place)
        content += [{"type": "text", "text": call_text(call)} for call in message.tool_calls or ()]
        role = TURN_OF.get(message.role, message.role)
        if i and role == turns[-1]["role"] and "tool" in (message.role, messages[i - 1].role):
            turns[-1]["content"] += [{"type": "text", "text": "\n"}, *content]  # results, and what follows them, are one turn
        else:
            turns.append({"role": role, "content": content})
        if message.role == "user":
            asked = asked or any(part["type"] == "image" or part["text"].strip() for part in content)
    if not asked:
        raise InvalidRequest("messages: no user message holds text or an image", param="messages")
    return turns, images


def prompt_and_images(
    engine: Engine, settings: Settings, turns: list[Turn], sources: list[ImageSource], **template: bool
) -> tuple[list[int], list[PreparedImage]]:
    """The prompt's tokens and the images' pixels, after every limit has been checked."""
    if len(sources) > settings.max_images:
        message = f"A request may hold at most {settings.max_images} images, not {len(sources)}."
        raise PayloadTooLarge(message, param=sources[settings.max_images][0])
    check_length(engine, sum(len(part.get("text", "")) for turn in turns for part in turn["content"]), "messages")
    images = [_picture(engine, settings, source, alone=len(sources) == 1) for source in sources]
    try:
        return engine.preprocessor.prompt(turns, [image.picture.layout for image in images], **template), images
    except ValueError as error:  # the chat template refuses the order of the roles
        raise InvalidRequest(str(error), param="messages") from error


def check_length(engine: Engine, chars: int, param: str) -> None:
    """Raises ContextTooLong for a text that no tokenizer can make fit."""
    if chars > CHARS_PER_TOKEN * engine.context_length:
        message = f"{chars:,} characters cannot fit a context of {engine.context_length:,} tokens."
        raise ContextTooLong(message, param=param)


def check_tokens(engine: Engine, tokens: Sequence[int], param: str) -> None:
    """Raises InvalidRequest for a token that the vocabulary does not have."""
    if max(tokens, default=0) >= (size := engine.preprocessor.vocab_size):
        raise InvalidRequest(f"{param}: the vocabulary ends at token {size - 1}", param=param)


def _picture(engine: Engine, settings: Settings, source: ImageSource, *, alone: bool) -> PreparedImage:
    place, data = source
    try:
        return media.prepare(data, partial(engine.preprocessor.picture, alone=alone), settings)
    except EspalierError as error:
        error.param = place
        raise


# ---- the level


def split_model(engine: Engine, asked: str | None) -> tuple[str, str | None]:
    """`name@level` to the model's name as the client wrote it and the level in it; no name is the served one's."""
    if asked is None or asked == engine.model_name:
        return engine.model_name, None
    base, _, level = asked.rpartition("@")
    if base != engine.model_name:
        raise unknown_model(engine, asked)
    return asked, level


def model_names(engine: Engine) -> dict[str, str]:
    """Every name that the model answers to, and the level that it means."""
    aliases = {f"{engine.model_name}@{level}": level for level in engine.menu}
    return {engine.model_name: engine.default_level, **aliases}


def unknown_model(engine: Engine, asked: str) -> UnknownModel:
    names = ", ".join(model_names(engine))
    return UnknownModel(f"The model {asked[:100]!r} does not exist. This server has: {names}.", param="model")


def hinted_level(engine: Engine, details: Sequence[str]) -> str | None:
    """What `image_url.detail` asks for; with several images the fullest wins. None when all leave it to the server."""
    if all(detail == "auto" for detail in details):
        return None
    levels = {DETAIL_LEVELS.get(detail, engine.default_level) for detail in details} & engine.menu.keys()
    return max(levels or {engine.default_level}, key=lambda name: engine.menu[name].visual_ratio)


def choose_level(
    engine: Engine, *, header: str | None, body: str | None, alias: str | None, detail: str | None
) -> tuple[str, str]:
    """The level, and where it came from: header before body before alias before detail before the server's default."""
    for reason, level in (("header", header), ("body", body), ("alias", alias), ("detail", detail)):
        if level is None:
            continue
        if level not in engine.menu:
            menu = ", ".join(engine.menu)
            raise UnknownLevel(f"Unknown pruning level {level[:100]!r}. The menu: {menu}.", param="pruning.level")
        return level, reason
    return engine.default_level, "default"
