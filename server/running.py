"""A request in the batch: what it runs, what it holds, and its answer so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from models.forward import SequenceInput
from models.kv_cache import RequestCache
from pruning.dynamic.planner import Plan
from server.confidence import Confidence
from server.detokenize import Detokenizer, LogprobQueue
from server.request import Receipt, Request


@dataclass
class Running:
    """A request in the batch: its plan and cache, the rows that have yet to run, and the answer so far."""

    request: Request
    plan: Plan
    receipt: Receipt
    cache: RequestCache
    input: SequenceInput  # what is left of the prompt, or the newest token
    max_new_tokens: int
    text: Detokenizer
    generator: torch.Generator
    ends: frozenset[int]  # tokens that end the answer
    logprobs: LogprobQueue
    confidence: Confidence
    cached_rows: int = 0  # of the prompt, that an earlier request had run
    output_ids: list[int] = field(default_factory=list)
    last_token: float = 0.0
    decode_seconds: float = 0.0

    @property
    def answering(self) -> bool:
        return bool(self.output_ids)
