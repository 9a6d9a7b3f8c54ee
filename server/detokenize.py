"""From tokens to text as it grows: never half a character, never a stop string; and their log-probabilities with it."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from dataclasses import replace

from server.request import TokenLogprob

BLANKS = " \t\r\n"
"""Stripped from the beginning of an answer. "ASSISTANT: red": the blank belongs to the prompt."""


class Detokenizer:
    """Text of one answer. `token_bytes` says what a token adds to it; one that `continues` a text keeps its leading blanks."""

    def __init__(self, token_bytes: Callable[[int], bytes], stop: Sequence[str] = (), continues: bool = False) -> None:
        self._token_bytes = token_bytes
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._stop = [s for s in stop if s]
        self._pending = ""
        self._started = continues
        self._may_stop = True
        self.stopped = False

    @property
    def holds(self) -> bool:
        """Whether a character or a stop string is half seen."""
        return bool(self._pending or self._decoder.getstate()[0])

    def push(self, token: int, may_stop: bool = True) -> str:
        """Add a token; return the text that is now certain. Sets `stopped` when a stop string is complete.

        Before it `may_stop`, a stop string is text like any other.
        """
        self._may_stop = may_stop
        return self._release(self._decoder.decode(self._token_bytes(token)))

    def finish(self) -> str:
        """The text still held back when the answer ends."""
        if self.stopped:
            return ""
        rest = self._release(self._decoder.decode(b"", final=True))
        pending, self._pending = self._pending, ""
        return rest + pending

    def _release(self, text: str) -> str:
        text = self._pending + text
        if not self._started:
            text = text.lstrip(BLANKS)
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


class LogprobQueue:
    """Log-probabilities of one answer, each handed out with the text of its token, so that the bytes of all are the content:
    leading blanks, which are not shown, and what a stop string cuts off are taken from the bytes of the tokens that had them."""

    def __init__(self, continues: bool = False) -> None:
        self._held: list[TokenLogprob] = []
        self._shown = 0  # bytes of text that came out while these were held
        self._leading = not continues

    def push(self, entry: TokenLogprob, text: str, *, holds: bool, stopped: bool) -> tuple[TokenLogprob, ...]:
        """Add a token's, and the `text` that came out with it; return those that may go out. The flags are the detokenizer's."""
        if self._leading:
            entry = replace(entry, bytes=entry.bytes.lstrip(BLANKS.encode()))
            self._leading = not entry.bytes
        self._held.append(entry)
        self._shown += len(text.encode())
        if holds:
            return ()
        out = _cut(self._held, self._shown) if stopped else self._held
        self._held, self._shown = [], 0
        return tuple(out)


def _cut(entries: Sequence[TokenLogprob], size: int) -> list[TokenLogprob]:
    """The entries with `size` bytes in all."""
    out = []
    for entry in entries:
        out.append(replace(entry, bytes=entry.bytes[:size]))
        size -= len(out[-1].bytes)
    return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
