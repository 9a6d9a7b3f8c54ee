"""A judge: a model behind an OpenAI-compatible API that scores free answers."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evals.official.http import client, said_by, value_at

if TYPE_CHECKING:
    import httpx

TRIES = 5
WAIT_S = 2.0


class JudgeError(ValueError):
    """The judge did not answer, or not in a way that can be read."""


@dataclass(frozen=True)
class Judge:
    """`url` ends in /v1, as the OpenAI client's `base_url` does; the key is OPENAI_API_KEY's."""

    url: str
    model: str

    def ask(self, messages: list[dict[str, str]], temperature: float, max_tokens: int) -> str:
        """One answer. Overload is waited for, a few times; raises JudgeError."""
        import httpx

        body = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
        reason = ""
        with client(self.url) as http:
            for attempt in range(TRIES):
                if attempt:
                    time.sleep(WAIT_S * attempt)
                try:
                    reply = http.post("chat/completions", json=body, headers=headers)
                except httpx.TransportError as error:
                    reason = str(error) or type(error).__name__
                    continue
                if reply.status_code == 200:
                    return _content(reply)
                reason = f"{reply.status_code}: {said_by(reply)}"
                if reply.status_code not in (408, 429) and reply.status_code < 500:
                    break
        raise JudgeError(reason)


def _content(reply: httpx.Response) -> str:
    try:
        return str(value_at(reply, "choices", 0, "message", "content"))
    except ValueError as error:
        raise JudgeError(str(error)) from error
