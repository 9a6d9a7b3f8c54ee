"""How long the work that waits will take, learned while serving; and which level requests get that name none, while much waits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

PRESSURE, CALM, WINDOW_S = 1.0, 0.5, 2.0
"""Saturation above which the default level goes down, and below which it comes back; one step in a window at most."""
SMOOTHING = 0.1
"""Weight of the newest measurement."""


@dataclass
class WorkRate:
    """Seconds of engine time that a prompt's row in one layer and a new token cost, and how long answers are: moving averages.

    Ours. Two rates, because prefill is bound by arithmetic and decoding by memory. A batch shares its time, so the rates are those
    of the batches that run. Before anything has run, nothing is known and every estimate is 0.
    """

    prefill_row: float = 0.0
    new_token: float = 0.0
    answer_tokens: float = 0.0

    def observe_step(self, seconds: float, prefill_rows: int, new_tokens: int) -> None:
        """One pass took `seconds` for `prefill_rows` rows (tokens times layers) of new prompts and `new_tokens` decoding steps."""
        if prefill_rows:
            left = max(0.0, seconds - self.new_token * new_tokens)
            self.prefill_row = _smooth(self.prefill_row, left / prefill_rows)
        elif new_tokens:
            self.new_token = _smooth(self.new_token, seconds / new_tokens)

    def observe_answer(self, tokens: int) -> None:
        self.answer_tokens = _smooth(self.answer_tokens, tokens)

    def step_seconds(self, prefill_rows: float, new_tokens: float) -> float:
        """Estimated seconds of one pass."""
        return self.prefill_row * prefill_rows + self.new_token * new_tokens

    def seconds(self, prefill_rows: float, max_new_tokens: int) -> float:
        """Estimated engine time of one request, in seconds."""
        return self.step_seconds(prefill_rows, min(self.answer_tokens, max_new_tokens))


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
