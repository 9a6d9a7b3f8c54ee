"""OpenAI's messages to a prepared request: prompt, pictures, sampling, level. What comes back is in `replies`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from server import media
from server.caller import CALLER
from server.detokenize import BLANKS
from server.errors import ContextTooLong, InvalidRequest, LevelNotAllowed, PayloadTooLarge, UnknownLevel
from server.media import ImageSource, OpenedImage
from server.request import PreparedRequest
from server.schema_parts import ImagePart, ImageUrl, Message
from server.schemas import (
    MAX_DETAIL_IMAGES,
    ChatRequest,
    Form,
    Generation,
    OpenAIRequest,
    StreamedRequest,
    TokenizeRequest,
    ToolUser,
    VqaRequest,
    parse,
)
from server.served import Picked, Served
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

# ---- reading: heavy, so it runs in a worker thread


@dataclass(frozen=True)
class Chat:
    """A conversation in the format of chat templates, and its images in order. `field` is the body's that holds it; `generation`
    lets the assistant's turn begin, `continued` ends the prompt within the last turn."""

    turns: list[Turn]
    images: list[ImageSource]
    details: list[str]
    field: str = "messages"
    generation: bool = True
    continued: bool = False


def read_chat(served: Served, settings: Settings, body: bytes, header: str | None) -> PreparedRequest:
    """A chat body to a prepared request; `header` is X-Pruning-Level. Raises a 4xx of `server.errors` for anything wrong in it."""
    request = parse(ChatRequest, body)
    chat = chat_of(request.messages, request)
    return prepare_chat(served.pick(request.model), settings, request, chat, header, kind="chatcmpl-")


def prepare_chat(
    picked: Picked, settings: Settings, request: StreamedRequest, chat: Chat, header: str | None, *, kind: str
) -> PreparedRequest:
    """A chat to a prepared request; `kind` begins its id."""
    level = request.pruning.level if request.pruning else None
    detail = hinted_level(picked.engine, chat.details)
    # The menu first: what is refused for its level costs no decoding.
    prepared = prepare(picked, settings, request, [], header=header, body=level, detail=detail, kind=kind)
    chat = with_tools(chat, prepared.tools)
    if prepared.detail and len(chat.images) > MAX_DETAIL_IMAGES:
        message = f"pruning.detail: for at most {MAX_DETAIL_IMAGES} images, not {len(chat.images)}"
        raise InvalidRequest(message, param="pruning.detail")
    return _with_chat(settings, prepared, chat)


def read_vqa(served: Served, settings: Settings, body: bytes | Mapping[str, Any], header: str | None) -> PreparedRequest:
    """A JSON body or a form's fields to a prepared request; see `read_chat`."""
    request = parse(VqaRequest, body)
    if not request.question.strip():
        raise InvalidRequest("question: must not be empty", param="question")
    content = [*({"type": "image"} for _ in request.image), {"type": "text", "text": request.question}]
    sources = [(f"image[{i}]", _data_url(image)) for i, image in enumerate(request.image)]
    prepared = prepare(served.pick(request.model), settings, request, [], header=header, body=request.level)
    return _with_chat(settings, prepared, Chat([{"role": "user", "content": content}], sources, [], "question"))


def chat_of(messages: Sequence[Message], request: ChatRequest | TokenizeRequest) -> Chat:
    """A body's messages, and how its template ends."""
    continued = bool(request.continue_final_message)
    generation = request.add_generation_prompt is not False and not continued
    return replace(conversation(messages), continued=continued, generation=generation)


def with_tools(chat: Chat, tools: ToolUse | None) -> Chat:
    """The chat in which the model is told of the functions that it may call."""
    return replace(chat, turns=told(chat.turns, tools.prompt())) if tools else chat


def _with_chat(settings: Settings, prepared: PreparedRequest, chat: Chat) -> PreparedRequest:
    """The prompt's tokens and the images' pixels, these when the request is known to fit."""
    start, engine = time.perf_counter(), prepared.engine
    prompt, opened = open_chat(engine, settings, chat)
    layouts = [image.layout for image in opened]
    engine.reserve(prepared.level, len(prompt), layouts, prepared.sampling.max_tokens, chat.field)
    images = media.decode_all(opened, engine.preprocessor)
    follow_up = any(turn["role"] == "assistant" for turn in chat.turns)
    seconds = time.perf_counter() - start
    return replace(prepared, prompt=prompt, images=images, image_seconds=seconds, follow_up=follow_up)


def prepare(
    picked: Picked, settings: Settings, request: Generation, prompt: list[int],
    *, header: str | None, body: str | None, detail: str | None = None, kind: str = "chatcmpl-",
) -> PreparedRequest:  # fmt: skip
    """What a request says beside its prompt: model, level, sampling, form of the reply."""
    engine = picked.engine
    level, reason = choose_level(
        engine, header=header, body=body, alias=picked.level, detail=detail, field=request.level_field
    )
    sampling = request.sampling(settings.default_max_tokens)
    check_tokens(engine, sampling.stop_token_ids, "stop_token_ids")
    check_tokens(engine, [token for token, _ in sampling.logit_bias], "logit_bias")
    prepared = PreparedRequest(engine, f"{kind}{uuid4().hex}", picked.name, prompt, [], 0.0, level, reason, sampling)
    if not isinstance(request, StreamedRequest):
        return prepared
    detailed = bool(request.pruning and request.pruning.detail)
    tools = request.tool_use() if isinstance(request, ToolUser) else None
    choices = next((form.choices for form in request.forms()), ())
    continues = request.continues() or any(choice != choice.lstrip(BLANKS) for choice in choices)
    prepared = replace(
        prepared, stream=bool(request.stream), detail=detailed, tools=tools, choices=choices, continues=continues,
        constraint=_constraint(engine, request.forms(), tools, blank=not continues),
        escalate_below=request.pruning.escalate_below if request.pruning else None,
        meet_deadline=bool(request.pruning and request.pruning.meet_deadline),
    )  # fmt: skip
    if not isinstance(request, OpenAIRequest):
        return prepared
    usage = bool(request.stream_options and request.stream_options.include_usage)
    return replace(prepared, n=request.n or 1, include_usage=usage)


def _constraint(engine: Engine, forms: Sequence[Form], tools: ToolUse | None, blank: bool) -> Constraint | None:
    """What the answer must be; `blank` says whether one may come before it. Raises InvalidRequest for a schema that cannot be kept,
    and for more than one form."""
    fields = [*(form.field for form in forms), *(["tools"] if tools else [])]
    if len(fields) > 1:
        raise InvalidRequest(f"{fields[1]}: an answer has one form; leave out {fields[0]} or {fields[1]}", param=fields[1])
    if not fields:
        return None
    grammar = tools.grammar() if tools else _form_grammar(forms[0])
    return compile_grammar(engine.grammar_tokenizer, grammar, fields[0], blank)


def _form_grammar(form: Form) -> str:
    return choice_grammar(form.choices) if form.schema is None else schema_grammar(form.schema, form.field, strict=form.strict)


def told(turns: list[Turn], text: str) -> list[Turn]:
    """The turns with a text before all else that the system says."""
    if not text:
        return turns
    part = {"type": "text", "text": text}
    if turns[0]["role"] == "system":
        return [{"role": "system", "content": [part, {"type": "text", "text": "\n\n"}, *turns[0]["content"]]}, *turns[1:]]
    return [{"role": "system", "content": [part]}, *turns]


def _data_url(image: str | bytes) -> str | bytes:
    """Bare base64 is allowed here; it holds no colon, and every URL does."""
    return image if isinstance(image, bytes) or ":" in image else f"data:;base64,{image}"


def conversation(messages: Sequence[Message], field: str = "messages") -> Chat:
    """Messages as a chat, each image with its place in the body.

    Chat templates of LLaVA know no functions: a call stands in the assistant's turn as it would write it, its result in the user's.
    """
    turns: list[Turn] = []
    images: list[tuple[str, ImageUrl]] = []
    asked = False
    for i, message in enumerate(messages):
        content: list[dict[str, str]] = []
        for j, part in enumerate(message.content or ()):
            place = f"{field}[{i}].{'output' if field == 'input' and message.role == 'tool' else 'content'}[{j}]"
            if not isinstance(part, ImagePart):
                content.append({"type": "text", "text": part.text})
            elif message.role == "user":
                content.append({"type": "image"})
                images.append((f"{place}.image_url" + ".url" * (field == "messages"), part.image_url))
            else:
                raise InvalidRequest(f"{place}: only user messages may hold images", param=place)
        content += [{"type": "text", "text": call_text(call)} for call in message.tool_calls or ()]
        role = TURN_OF.get(message.role, message.role)
        joins = message.tool_calls or "tool" in (message.role, messages[i - 1].role)
        if i and role == turns[-1]["role"] and joins:  # calls are one turn, and so are results and what follows them
            turns[-1]["content"] += [{"type": "text", "text": "\n"}, *content]
        else:
            turns.append({"role": role, "content": content})
        if message.role == "user":
            asked = asked or any(part["type"] == "image" or part["text"].strip() for part in content)
    if not asked:
        raise InvalidRequest(f"{field}: no user message holds text or an image", param=field)
    return Chat(turns, [(place, image.url) for place, image in images], [image.detail for _, image in images], field)


def open_chat(engine: Engine, settings: Settings, chat: Chat) -> tuple[list[int], list[OpenedImage]]:
    """The prompt's tokens, each image as its visual tokens, by the headers of its images, of which none is decoded."""
    if len(chat.images) > settings.max_images:
        message = f"A request may hold at most {settings.max_images} images, not {len(chat.images)}."
        raise PayloadTooLarge(message, param=chat.images[settings.max_images][0])
    check_length(engine, sum(len(part.get("text", "")) for turn in chat.turns for part in turn["content"]), chat.field)
    opened = media.open_all(chat.images, engine.preprocessor, settings)
    try:
        options = {"generation": chat.generation, "continued": chat.continued}
        return engine.preprocessor.prompt(chat.turns, [image.layout for image in opened], **options), opened
    except ValueError as error:  # the chat template refuses the order of the roles
        raise InvalidRequest(str(error), param=chat.field) from error


def check_length(engine: Engine, chars: int, param: str) -> None:
    """Raises ContextTooLong for a text that no tokenizer can make fit."""
    if chars > CHARS_PER_TOKEN * engine.context_length:
        raise ContextTooLong.of(f"more than {chars // CHARS_PER_TOKEN}", engine.context_length, param)


def check_tokens(engine: Engine, tokens: Sequence[int], param: str) -> None:
    """Raises InvalidRequest for a token that the vocabulary does not have."""
    if max(tokens, default=0) >= (size := engine.preprocessor.vocab_size):
        raise InvalidRequest(f"{param}: the vocabulary ends at token {size - 1}", param=param)


# ---- the level


def hinted_level(engine: Engine, details: Sequence[str]) -> str | None:
    """What `image_url.detail` asks for; with several images the fullest wins. None when all leave it to the server."""
    if all(detail == "auto" for detail in details):
        return None
    levels = {DETAIL_LEVELS.get(detail, engine.default_level) for detail in details} & engine.menu.keys()
    return max(levels or {engine.default_level}, key=lambda name: engine.menu[name].visual_ratio)


def choose_level(
    engine: Engine, *, header: str | None, body: str | None, alias: str | None, detail: str | None, field: str = "pruning.level"
) -> tuple[str, str]:
    """The level, and where it came from: header before the body's `field` before alias before detail before the key's or server's
    default."""
    fields = {"header": "X-Pruning-Level", "body": field, "alias": "model", "detail": "image_url.detail"}
    allowed = CALLER.get().allowed(engine.menu)
    if not allowed:
        raise LevelNotAllowed("This key may ask for none of this model's levels.", param="model")
    asked = {"header": header, "body": body, "alias": alias, "detail": detail}
    for reason, level in asked.items():
        if level is not None and level not in engine.menu:
            message = f"Unknown pruning level {level[:100]!r}. The menu: {', '.join(engine.menu)}."
            raise UnknownLevel(message, param=fields[reason])
    for reason, level in asked.items():
        if level is None:
            continue
        if level not in allowed and reason == "detail":
            continue  # it is a hint
        if level not in allowed:
            raise LevelNotAllowed(f"This key may ask for {', '.join(allowed)}, and not for {level!r}.", param=fields[reason])
        return level, reason
    if (level := engine.current_default()) in allowed:
        return level, "default" if level == engine.default_level else "load"
    return allowed[0], "default"
