"""What can be wrong with a checkpoint or a setting; without any other package, so that the model alone needs none."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pydantic import ValidationError


class CheckpointError(Exception):
    """The checkpoint cannot be loaded; the message names the file or key at fault and what to do."""


class Fault(NamedTuple):
    """A key, dotted, empty for the whole; and what is wrong with it."""

    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.key}: {self.text}" if self.key else self.text


def faults(error: ValidationError) -> list[Fault]:
    """What pydantic found wrong, in its order."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [Fault(".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")) for one in found]
