"""A pass of the model over all running requests, or over one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.forward import SequenceInput, decode_input, decode_inputs, forward
from models.llava import Llava
from models.upload import upload
from server.running import Running
from server.scheduler import share

log = logging.getLogger("espalier.engine")


@dataclass(frozen=True)
class Part:
    """What a request runs in one pass: a part of its prompt, the last or only one of which `ends` it, or its newest token."""

    one: Running
    input: SequenceInput

    @property
    def ends(self) -> bool:
        return len(self.input) == len(self.one.input)

    @property
    def prefill_rows(self) -> int:
        """Rows of a prompt, in all layers together."""
        return 0 if self.one.answering else len(self.input) * sum(self.input.route.layers)


def native_tokens(model: Llava, running: Sequence[Running]) -> int:
    """Tokens of prompts that run with the answers in one native call."""
    if model.decode_plan is None or any(one.input.text_spans is not None for one in running):
        return 0
    return max(0, model.decode_plan.max_rows - sum(one.answering for one in running))


def divide(running: Sequence[Running], budget: int) -> tuple[list[Part], list[Part]]:
    """The next pass: a token of each answer, and `budget` rows of the prompts."""
    prompts = [one for one in running if not one.answering]
    shares = zip(prompts, share([len(one.input) for one in prompts], budget), strict=True)
    return [Part(one, one.input) for one in running if one.answering], [
        Part(one, one.input.first(rows)) for one, rows in shares if rows
    ]


def run_pass(model: Llava, answers: Sequence[Part], prompts: Sequence[Part]) -> list[Tensor | Exception | None]:
    """What `run_batch` says of each: in one native call if it takes all. Else apart, for decoding has kernels of its own."""
    plan, both = model.decode_plan, [*answers, *prompts]
    if plan and plan.takes([part.input for part in both]):
        return [*run_batch(model, both)]
    return [*run_batch(model, answers), *run_batch(model, prompts)]


def run_batch(model: Llava, batch: Sequence[Part]) -> Sequence[Tensor | Exception | None]:
    """Logits [vocab] of each request on the CPU, None where its prompt goes on, or what went wrong with it.

    If the common pass fails, each one runs alone to find out whose.
    """
    if not batch:
        return []
    lengths = [list(part.one.cache.lengths) for part in batch]
    try:
        logits = iter(forward(model, [part.input for part in batch]).cpu())  # a GPU is waited for here, once for all requests
    except Exception as error:
        if len(batch) == 1:
            return [error]
        log.exception("a pass over %d requests failed; running each alone", len(batch))
        for part, length in zip(batch, lengths, strict=True):
            part.one.cache.lengths[:] = length
        return [run_batch(model, [part])[0] for part in batch]
    results = [next(logits) if part.ends else None for part in batch]
    for part, result in zip(batch, results, strict=True):
        if result is None:
            part.one.input = part.one.input.behind(len(part.input))
    return results


def lay_out(model: Llava, answers: Sequence[Running]) -> None:
    """The tokens just drawn are what these requests bring to the next pass."""
    ids = upload([one.output_ids[-1] for one in answers], model.device)
    places = [len(one.request.prompt) + len(one.output_ids) - 1 for one in answers]
    inputs = decode_inputs(model, ids, places, [(one.plan.route, one.cache) for one in answers])
    for one, row in zip(answers, inputs, strict=True):
        one.input = row


def follow(model: Llava, one: Running, tokens: Sequence[int]) -> Tensor:
    """Logits [vocab] behind some tokens of an answer that has not begun, whose cache stays as it is."""
    lengths = list(one.cache.lengths)
    try:
        for place, token in enumerate(tokens, len(one.request.prompt)):
            ids = torch.tensor([token], device=model.device)
            logits = forward(model, [decode_input(model, ids, place, one.plan.route, one.cache)])
        return logits[0].cpu()
    finally:
        one.cache.lengths[:] = lengths
