"""How long work takes, learned while serving; and which level requests get that name none, while much waits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf

PRESSURE, CALM, WINDOW_S = 1.0, 0.5, 2.0
"""Saturation above which the default level goes down, and below which it comes back; one step in a window at most."""
SMOOTHING = 0.1
"""Weight of the newest measurement."""
STRETCH = 1.0
"""How much longer prompts may make a pass, over one in which all only answer; so many times more if more wait than are answered."""
LEAST_TOKENS, LEAST_NATIVE_TOKENS = 16, 8
"""Tokens of prompts that a pass runs beside answers however long it takes: layer by layer, and in one native call."""


@dataclass
class Rate:
    """Seconds for each unit of some work: all seconds over all work, in which older work counts less."""

    _seconds: float = 0.0
    _work: float = 0.0

    def observe(self, seconds: float, work: float) -> None:
        self._seconds = (1 - SMOOTHING) * self._seconds + seconds
        self._work = (1 - SMOOTHING) * self._work + work

    @property
    def value(self) -> float:
        """0 before anything is known."""
        return self._seconds / self._work if self._work else 0.0


@dataclass
class WorkRate:
    """Engine time that a prompt's row in one layer, a visual token of a picture and a new token cost, and how long answers are.

    Ours. Prefill is bound by arithmetic and decoding by memory, so they have rates of their own. A batch shares its time, so the
    rates are those of the batches that run. Before anything has run, nothing is known and every estimate is 0.
    """

    prefill_row: Rate = field(default_factory=Rate)
    visual_token: Rate = field(default_factory=Rate)
    new_token: Rate = field(default_factory=Rate)
    decode_pass: float = 0.0
    """Seconds of a pass in which all only answer, smoothed."""
    answer_tokens: float = 0.0

    def observe_pass(self, seconds: float, prefill_rows: int, new_tokens: int) -> None:
        """One pass took `seconds` for `prefill_rows` rows (tokens times layers) of new prompts and `new_tokens` decoding steps."""
        if prefill_rows:
            self.prefill_row.observe(max(0.0, seconds - self.decode_pass * bool(new_tokens)), prefill_rows)
        elif new_tokens:
            self.new_token.observe(seconds, new_tokens)
            self.decode_pass = _smooth(self.decode_pass, seconds)

    def observe_answer(self, tokens: int) -> None:
        self.answer_tokens = _smooth(self.answer_tokens, tokens)

    def pass_tokens(self, layers: int, most: int, prompts_per_answer: float, native: int) -> int:
        """Tokens of prompts that the next pass may run: `most`, or fewer beside answers, which then go on at nearly their own pace.

        Where several wait for each that is answered, answers give way to as many: small parts of prompts cost more than large ones.
        Up to `native` tokens run with the answers in one native call. Parts that run layer by layer instead are worth it from about
        twice that size on.
        """
        if prompts_per_answer == inf:
            return most
        seconds, stretch = self.prefill_row.value * layers, STRETCH * max(1.0, prompts_per_answer)
        least = LEAST_TOKENS if native < LEAST_NATIVE_TOKENS else LEAST_NATIVE_TOKENS
        tokens = max(least, int(stretch * self.decode_pass / seconds)) if seconds else least
        return min(most, native if least <= native < tokens < 2 * native else tokens)

    def prompt_seconds(self, prefill_rows: float, visual_tokens: int) -> float:
        """Estimated engine time before a request's first token."""
        return self.prefill_row.value * prefill_rows + self.visual_token.value * visual_tokens

    def answer_seconds(self, max_new_tokens: int) -> float:
        """Estimated engine time of an answer's tokens."""
        return self.new_token.value * min(self.answer_tokens, max_new_tokens)


def _smooth(mean: float, value: float) -> float:
    return mean + SMOOTHING * (value - mean) if mean else value


class DefaultLevel:
    """The level of requests that name none: the first of `levels` while there is room, a cheaper one under pressure.

    Ours: one step down for each window that begins above PRESSURE, one up for each below CALM; between the two it stays, so that
    it does not swing.
    """

    def __init__(self, levels: Sequence[str], now: float) -> None:
        self.levels = tuple(levels)
        self._step, self._since, self._lock = 0, now, threading.Lock()

    def choose(self, saturation: float, now: float) -> str:
        with self._lock:
            windows = int((now - self._since) / WINDOW_S)
            if windows and saturation > PRESSURE and self._step < len(self.levels) - 1:
                self._step, self._since = self._step + 1, now
            elif windows and saturation < CALM and self._step:
                self._step, self._since = max(0, self._step - windows), now
            return self.levels[self._step]
