"""Answers that are not sure enough at a cheap level, and are made again at the fullest (`pruning.escalate_below`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from server.request import Delta, Escalated, Event, Failed, Finished


@dataclass
class Escalation:
    """Holds each choice's first answer back until it is known to be sure enough.

    `again(choice)` asks for the choice's second answer, and says whether it will come: where the server has no place for it, the
    first one stays, as where the second fails before it begins.
    """

    below: float
    again: Callable[[int], bool]
    _held: dict[int, list[Event]] = field(default_factory=dict)
    _first: dict[int, Finished] = field(default_factory=dict)

    def pass_on(self, choice: int, event: Event) -> list[Event]:
        """The events that may be told now that `event` of a choice has come."""
        if first := self._first.get(choice):
            held = self._held.pop(choice, [])
            if isinstance(event, Failed):
                return held or [event]
            return [self._joined(first, event) if isinstance(event, Finished) else event]
        held = self._held.setdefault(choice, [])
        held.append(event)
        if isinstance(event, Failed):
            return held
        if not isinstance(event, Finished):
            return []
        if (event.receipt.confidence or 0.0) >= self.below or not self.again(choice):
            return held
        text = "".join(one.text for one in held if isinstance(one, Delta))
        escalated = Escalated(event.receipt.level, event.receipt.confidence, text, event.completion_tokens)
        self._first[choice] = replace(event, receipt=replace(event.receipt, escalated=escalated))
        return []

    def _joined(self, first: Finished, second: Finished) -> Finished:
        """The second answer's end, with what the first one said and the time that it took."""
        timings = {stage: first.timings.get(stage, 0.0) + seconds for stage, seconds in second.timings.items()}
        return replace(second, receipt=replace(second.receipt, escalated=first.receipt.escalated), timings=timings)
