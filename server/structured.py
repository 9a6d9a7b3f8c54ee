"""Structured answers: JSON, JSON that fits a schema, one of some choices, or a function call; by llguidance's grammars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

from server.errors import InvalidRequest
from server.json_schema import check_schema, closed

LIMITS = LLParserLimits(verbose_errors=False)
MAX_GRAMMAR_CHARS = 2**16
"""Of all schemas or choices of a request together; llguidance bounds what it makes of them."""
FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as models write it most: free blanks would let a weak model write blanks for ever."""


WORDS = {
    "NoExtensionBias": "no answer can fit",
    "Enable 'coerce_one_of' option to approximate oneOf with anyOf": "Send anyOf, or no `strict`",
}
"""What llguidance says that a client cannot know, and what it means here."""


class Constraint:
    """What an answer may still be: a grammar, and the tokens that have been taken. Copies go separate ways."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> Constraint:
        return Constraint(self._matcher.deep_copy())

    def allowed(self, size: int) -> Tensor:
        """Which tokens may come next, bool [size]; the end of the answer is one of them."""
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        if self._matcher.is_error():
            raise _too_large(self._matcher)
        allowed = torch.zeros(size, dtype=torch.bool)
        allowed[: min(size, len(bits))] = torch.from_numpy(bits[:size]).bool()
        return allowed

    def take(self, token: int) -> bool:
        """Go on with a token; whether the answer is now complete and nothing can follow."""
        if not self._matcher.consume_token(token):
            raise _too_large(self._matcher)
        return bool(self._matcher.is_stopped())


def compile_grammar(tokenizer: LLTokenizer, grammar: str, param: str, blank: bool = True) -> Constraint:
    """A grammar, whose rule `answer` is what an answer must be, ready to run. A `blank` may come before: it is the prompt's, and
    SentencePiece writes it into the first token. Raises InvalidRequest, on `param`, for one that is too large, or that llguidance
    does not take."""
    if len(grammar) > MAX_GRAMMAR_CHARS:
        message = f"{param}: all schemas or choices together may have at most {MAX_GRAMMAR_CHARS:,} characters"
        raise InvalidRequest(message, param=param)
    alone = LLMatcher(tokenizer, f"start: answer\n{grammar}", log_level=0, limits=LIMITS)
    alone.compute_bitmask()
    if alone.is_error():
        raise InvalidRequest(f"{param}: {_reason(alone)}", param=param)
    start = '" "? answer' if blank else "answer"
    return Constraint(LLMatcher(tokenizer, f"start: {start}\n{grammar}", log_level=0, limits=LIMITS))


def _too_large(matcher: LLMatcher) -> InvalidRequest:
    """The parser has met one of its limits within an answer."""
    return InvalidRequest(f"the schema is too large to be followed: {_reason(matcher)}")


def _reason(matcher: LLMatcher) -> str:
    """llguidance says on its first line what is wrong, behind a place in our own grammar; of a pattern below it."""
    lines = str(matcher.get_error()).splitlines() or [""]
    of_pattern = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if "regex parse error" in lines[0] and of_pattern:
        return f"a pattern is not understood: {of_pattern[0][:200]}"
    reason = lines[0].rpartition("failed to compile JSON schema: ")[2][:200]
    for theirs, ours in WORDS.items():
        reason = reason.replace(theirs, ours)
    return reason


def schema_grammar(schema: dict[str, Any], param: str, *, strict: bool) -> str:
    """Answers that are JSON and fit `schema`; unless `strict`, keywords that llguidance lacks bind nothing."""
    return f"answer: {json_rule(schema, param, strict=strict)}"


def choice_grammar(choices: Sequence[str]) -> str:
    """Answers that are one of `choices`."""
    return f"answer: {' | '.join(map(quoted, choices))}"


def json_rule(schema: dict[str, Any], param: str, *, strict: bool) -> str:
    """A schema as the right side of a Lark rule. Raises InvalidRequest, on `param`, for one that would harm the server."""
    check_schema(schema, param)
    return f"%json {json.dumps({**closed(schema), 'x-guidance': {**FORM, 'lenient': not strict}})}"


def quoted(text: str) -> str:
    """A literal of a Lark grammar."""
    return json.dumps(text)
