"""Runs that end in the middle, as if they were killed."""

from __future__ import annotations

from typing import Any

import pytest


class Killed(BaseException):
    """As SIGKILL would: nothing of ours may catch it and tidy up."""


def die_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> list[int]:
    """Let the `call`-th call of owner.name be the last; returns the list that counts calls."""
    real, calls = getattr(owner, name), [0]

    def counted(*args: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return real(*args, **named)

    monkeypatch.setattr(owner, name, counted)
    return calls
