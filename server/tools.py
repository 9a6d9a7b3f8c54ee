"""Function calls: what the model is told of the functions, the grammar of a call, and calls read from the answer as it grows.

In an answer a call is `{"name": "f", "arguments": {...}}`. An answer that begins with a brace is a call, every other one is text.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from server.request import FinishReason
from server.schema_parts import AssistantCall, Function
from server.structured import json_rule, quoted

HEAD = re.compile(r'\{"name": "([A-Za-z0-9_-]+)", "arguments": ')
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
ASK = 'You can call these functions. To call one, answer only with {"name": ..., "arguments": {...}}.'


@dataclass(frozen=True)
class ToolUse:
    """The functions an answer may call, and whether it must call one. One that must be called leaves the model only arguments."""

    functions: tuple[Function, ...]
    required: bool

    @property
    def only(self) -> Function | None:
        """The function that is certain to be called."""
        return self.functions[0] if self.required and len(self.functions) == 1 else None

    def calls(self, begun: bytes) -> bool:
        """Whether an answer that begins so is a call and no text."""
        return self.required or begun.lstrip().startswith(b"{")

    def grammar(self) -> str:
        """Of the answers: a call, or, unless one is required, a text."""
        rules = [f"args_{i}: {_arguments(function, i)}" for i, function in enumerate(self.functions)]
        if self.only:
            return "\n".join(["answer: args_0", *rules])
        calls = [
            f'{quoted(f"""{{"name": "{function.name}", "arguments": """)} args_{i} "}}"'
            for i, function in enumerate(self.functions)
        ]
        answer = "answer: call" if self.required else "answer: (TEXT | call)?"
        text = [] if self.required else [r"TEXT: /[^\s{](.|\n)*/"]
        return "\n".join([answer, *text, f"call: {' | '.join(calls)}", *rules])

    def prompt(self) -> str:
        """What the model is told: nothing where it has nothing to choose."""
        if self.only:
            return ""
        told = [json.dumps(function.model_dump(exclude={"strict"}, exclude_none=True)) for function in self.functions]
        return "\n".join([ASK, *told])


def _arguments(function: Function, index: int) -> str:
    schema = NO_ARGUMENTS if function.parameters is None else function.parameters
    return json_rule(schema, f"tools[{index}].function.parameters", strict=bool(function.strict))


def call_text(call: AssistantCall) -> str:
    """A call of an earlier turn as the model would have written it."""
    return f'{{"name": {json.dumps(call.function.name)}, "arguments": {call.function.arguments or "{}"}}}'


class AnswerReader:
    """Turns the text of one answer into the deltas of a chat: pieces of content, or of a function call."""

    def __init__(self, tools: ToolUse | None) -> None:
        self._tools = tools
        self._kind: Literal["text", "call"] | None = None if tools else "text"  # None until the answer shows which
        self._held = ""

    def push(self, text: str) -> list[dict[str, Any]]:
        """The deltas of the next piece of text."""
        if self._kind == "text":
            return [{"content": text}]
        self._held += text
        return [*self._begin(), *self._arguments(keep=self._closing)]

    def finish(self, reason: FinishReason) -> tuple[list[dict[str, Any]], FinishReason]:
        """What is left to tell, and why the answer ended."""
        if self._kind is None and self._held:  # cut before it showed whose call it is
            return [{"content": self._held}], reason
        if self._kind != "call":
            return [], reason
        if reason == "stop":
            return self._arguments(keep=self._closing), "tool_calls"
        return self._arguments(keep=0), reason

    @property
    def _closing(self) -> int:
        """Characters at the end of an answer that are the call's own and none of its arguments'."""
        return 0 if self._tools and self._tools.only else 1

    def _begin(self) -> list[dict[str, Any]]:
        assert self._tools
        if self._kind or not self._held:
            return []
        if self._tools.only:
            return [self._call(self._tools.only.name)]
        if found := HEAD.match(self._held):
            self._held = self._held[found.end() :]
            return [self._call(found[1])]
        if self._held.startswith("{"):
            return []
        self._kind = "text"
        text, self._held = self._held, ""
        return [{"content": text}]

    def _call(self, name: str) -> dict[str, Any]:
        self._kind = "call"
        function = {"name": name, "arguments": ""}
        return {"tool_calls": [{"index": 0, "id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}]}

    def _arguments(self, keep: int) -> list[dict[str, Any]]:
        """What is known of the arguments and not yet told, but the last `keep` characters."""
        cut = len(self._held) - keep
        if self._kind != "call" or cut <= 0:
            return []
        text, self._held = self._held[:cut], self._held[cut:]
        return [{"tool_calls": [{"index": 0, "function": {"arguments": text}}]}]
