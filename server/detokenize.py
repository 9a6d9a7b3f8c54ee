"""From tokens to text as it grows: never half a character, never a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Detokenizer:
    """Text of one answer. Decodes a short tail at a time, so that an answer of n tokens costs n, not n squared."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._ids: list[int] = []
        self._prefix = self._read = 0  # the tail is ids[prefix:]; ids[:read] have given their text
        self._pending = ""
        self._started = False
        self._may_stop = True
        self.stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        """Add a token; return the text that is now certain. Sets `stopped` when a stop string is complete.

        Before it `may_stop`, a stop string is text like any other.
        """
        self._may_stop = may_stop
        self._ids.append(token)
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        if after.endswith("\ufffd"):  # an unfinished character
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """The text still held back when the answer ends."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        rest = self._release(self._decode(self._ids[self._prefix :])[len(before) :])
        pending, self._pending = self._pending, ""
        return rest + pending

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)  # type: ignore[no-any-return]

    def _release(self, text: str) -> str:
        text = self._pending + text
        if not self._started:
            text = text.lstrip()  # "ASSISTANT: red": the blank belongs to the prompt
            self._started = bool(text)
        if not self._may_stop:
            self._pending = ""
            return text
        cut = min((at for at in (text.find(s) for s in self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped, self._pending = True, ""
            return text[:cut]
        held = max((_overlap(text, s) for s in self._stop), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
