"""A pass of the model over all running requests, or over one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from models.forward import decode_input, forward
from models.llava import Llava
from server.running import Running

log = logging.getLogger("espalier.engine")


def run_batch(model: Llava, batch: Sequence[Running]) -> list[Tensor | Exception]:
    """Logits of each request, or what went wrong with it. If the common pass fails, each one runs alone to find out whose."""
    if not batch:
        return []
    lengths = [list(one.cache.lengths) for one in batch]
    try:
        return list(forward(model, [one.input for one in batch]))
    except Exception as error:
        if len(batch) == 1:
            return [error]
        log.exception("a pass over %d requests failed; running each alone", len(batch))
    for one, length in zip(batch, lengths, strict=True):
        one.cache.lengths[:] = length
    return [run_batch(model, [one])[0] for one in batch]


def lay_out(model: Llava, one: Running, token: int) -> None:
    """The token just drawn is what the request brings to the next pass."""
    place = len(one.request.prompt) + len(one.output_ids) - 1
    ids = torch.tensor([token], device=model.device)
    one.input = decode_input(model, ids, place, one.plan.route, one.cache)


def follow(model: Llava, one: Running, tokens: Sequence[int]) -> Tensor:
    """Logits [vocab] behind some tokens of an answer that has not begun, whose cache stays as it is."""
    lengths = list(one.cache.lengths)
    try:
        for place, token in enumerate(tokens, len(one.request.prompt)):
            ids = torch.tensor([token], device=model.device)
            logits = forward(model, [decode_input(model, ids, place, one.plan.route, one.cache)])
        return logits[0]
    finally:
        one.cache.lengths[:] = lengths
