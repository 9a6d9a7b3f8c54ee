"""How sure an answer is: the probability of each choice, of yes against no, or of the answer's tokens. Ours."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from server.detokenize import BLANKS
from server.request import Receipt, Request
from server.structured import Constraint

LEAST = 0.005
"""A beginning of this probability or less that several choices share is shared out evenly instead of followed."""
MAX_PASSES = 32
"""Most tokens that the model is run on for the choices of one answer, beside the answer's own."""
YES_NO = ("yes", "no")

Spell = Callable[[int], bytes]
Follow = Callable[[Sequence[int]], Tensor]
"""The logits [vocab] behind some tokens of an answer."""


class Confidence:
    """How sure one answer is, as it grows."""

    def __init__(self, request: Request, yes_no: YesNo, spell: Spell, ends: Collection[int], max_tokens: int) -> None:
        self._request, self._yes_no, self._spell = request, yes_no, spell
        self._ends, self._max_tokens = ends, max_tokens
        self._blanks = "" if request.continues else BLANKS
        self._probabilities: dict[str, float] | None = None
        self._answer: bytes | None = None
        self._logprob = 0.0

    def note(self, logits: Tensor, allowed: Tensor | None, token: int, follow: Follow) -> None:
        """`token` was drawn from logits [vocab], of those that were `allowed`, bool [vocab]."""
        request = self._request
        if self._answer is None:
            self._answer = b""
            if request.choices and request.constraint:
                scorer = ChoiceScorer(request.choices, self._ends, self._spell, follow, self._max_tokens, self._blanks)
                self._probabilities = scorer.score(logits, request.constraint)
            else:
                self._probabilities = self._yes_no.score(logits, token)
        if token not in self._ends:
            self._answer += self._spell(token)
        if request.confidence:
            scores = logits if allowed is None else logits.masked_fill(~allowed.to(logits.device), -torch.inf)
            self._logprob += float(scores.log_softmax(-1)[token])

    def told(self, receipt: Receipt) -> Receipt:
        """The receipt of the answer, now that it has ended."""
        answer = (self._answer or b"").decode(errors="replace").lstrip(self._blanks)
        for form in (answer, answer.strip().rstrip(".").lower()):  # yes and no may end in a full stop
            if self._probabilities and form in self._probabilities:
                return replace(receipt, probabilities=self._probabilities, confidence=self._probabilities[form])
        return replace(receipt, confidence=round(math.exp(self._logprob), 4)) if self._request.confidence else receipt


@dataclass(order=True)
class _Beginning:
    """Tokens with which several choices begin, what they spell, and (negative: the likeliest comes first) their probability."""

    mass: float
    tokens: tuple[int, ...]
    text: bytes = field(compare=False)
    constraint: Constraint = field(compare=False)


class ChoiceScorer:
    """The probability that an answer is each of some choices, as the masked model would draw it at temperature 1.

    Ours. Tokens with which only one choice begins are its own. Where several begin alike, the model is run on it, the likeliest
    beginning first, so that each choice gets its exact part; what is too unlikely, or too much, is shared out evenly.
    """

    def __init__(
        self, choices: Sequence[str], ends: Collection[int], spell: Spell, follow: Follow, max_tokens: int, blanks: str = BLANKS
    ) -> None:
        self._blanks = blanks.encode()  # before a choice, and none of it
        self._choices = {choice: choice.encode() for choice in choices}
        self._ends, self._spell, self._follow, self._max_tokens = ends, spell, follow, max_tokens
        self._parts = dict.fromkeys(choices, 0.0)

    def score(self, logits: Tensor, constraint: Constraint) -> dict[str, float]:
        """By choice, given the logits [vocab] of the answer's first token."""
        waiting = self._share(_Beginning(-1.0, (), b"", constraint), logits)
        heapify(waiting)
        passes = 0
        while waiting:
            one = heappop(waiting)
            passes += len(one.tokens)
            if -one.mass < LEAST or passes > MAX_PASSES or len(one.tokens) >= self._max_tokens:
                self._give(self._possible(one.text), -one.mass)
            else:
                for longer in self._share(one, self._follow(one.tokens)):
                    heappush(waiting, longer)
        total = sum(self._parts.values()) or 1.0  # it is 0 where a token of `stop_token_ids` is all but certain
        return {choice: round(part / total, 4) for choice, part in self._parts.items()}

    def _share(self, one: _Beginning, logits: Tensor) -> list[_Beginning]:
        """Give each choice what is its own of the next tokens, whose logits [vocab] these are; return what several share."""
        allowed = one.constraint.allowed(len(logits))
        probabilities = logits.cpu().masked_fill(~allowed, -torch.inf).softmax(-1)
        shared = []
        for token in allowed.nonzero()[:, 0].tolist():
            mass = -one.mass * float(probabilities[token])
            text = one.text + self._spell(token) if one.text else self._spell(token).lstrip(self._blanks)
            possible = self._ended(one.text) if token in self._ends else self._possible(text)
            if len(possible) > 1:
                after = one.constraint.copy()
                after.take(token)
                shared.append(_Beginning(-mass, (*one.tokens, token), text, after))
            else:
                self._give(possible, mass)
        return shared

    def _possible(self, text: bytes) -> list[str]:
        return [choice for choice, spelled in self._choices.items() if spelled.startswith(text)]

    def _ended(self, text: bytes) -> list[str]:
        """The choice that an answer is if it ends here; none, if it is cut."""
        return [choice for choice, spelled in self._choices.items() if spelled == text]

    def _give(self, choices: Sequence[str], mass: float) -> None:
        for choice in choices:
            self._parts[choice] += mass / len(choices)


class YesNo:
    """The tokens that say yes and no, in any case and with or without a blank before."""

    def __init__(self, vocab_size: int, spell: Spell) -> None:
        words = [spell(token).strip().lower() for token in range(vocab_size)]
        self._tokens = {word: [i for i, spelled in enumerate(words) if spelled == word.encode()] for word in YES_NO}

    def score(self, logits: Tensor, token: int) -> dict[str, float] | None:
        """The probabilities of yes against no, where an answer's first `token` is one of them."""
        if not any(token in tokens for tokens in self._tokens.values()):
            return None
        own = logits.softmax(-1)
        parts = {word: float(own[tokens].sum()) for word, tokens in self._tokens.items()}
        return {word: round(part / sum(parts.values()), 4) for word, part in parts.items()}

