"""Live agreement: some finished answers are checked against level `off` while nobody waits for anything."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.families import Layout
from models.forward import SequenceInput, forward, prefill_input
from models.kv_cache import KVCache
from models.vision.features import ImageFeatures
from pruning.dynamic.planner import Planner
from server.metrics import Metrics
from server.prefill import Prefill
from server.running import Running
from server.sampling import is_greedy

log = logging.getLogger("espalier.engine")

MAX_WAITING = 8
"""Answers that wait to be checked; no more are taken while so many do."""
MAX_TOKENS = 64
"""Rows of a pass, and tokens of an answer that is checked: whoever arrives waits for one such pass at most."""
ID = "shadow"


@dataclass(frozen=True)
class Sample:
    """A finished answer: its prompt's tokens, which pictures they show, and the answer's tokens. `pixels` of the pictures, where
    the level's tower did not see all of them."""

    level: str
    prompt: tuple[int, ...]
    images: tuple[tuple[str, Layout], ...]
    answer: tuple[int, ...]
    pixels: tuple[Tensor, ...] = ()


class Shadow:
    """Checks a seeded share of the greedy answers, one part of a prompt at a time.

    An answer is the one at `off` if after each of its beginnings the model at `off` likes its next token best. So prompt and answer
    run as one prompt, and nothing is decoded.
    """

    def __init__(
        self, checkpoint: Checkpoint, planner: Planner, prefill: Prefill, kv: KVCache, metrics: Metrics, share: float
    ) -> None:
        self._model, self._planner, self._prefill, self._kv, self._metrics = checkpoint.model, planner, prefill, kv, metrics
        self._share, self._random = share, Random(0)
        self._waiting: deque[Sample] = deque()
        self._checked: Sample | None = None
        self._seen: list[ImageFeatures] = []  # the pictures of the answer that is being checked
        self._left: SequenceInput | None = None

    @property
    def idle(self) -> bool:
        return not self._waiting and self._checked is None

    def note(self, one: Running) -> None:
        """Take a share of the answers that have ended."""
        request, answer = one.request, one.output_ids
        plain = is_greedy(request.sampling) and request.constraint is None and one.plan.level != "off"
        if not plain or self._random.random() >= self._share:
            return
        if len(self._waiting) < MAX_WAITING and len(answer) <= MAX_TOKENS and self._model.config.image_token_id not in answer:
            images = tuple((image.digest, image.picture.layout) for image in request.images)
            partly = self._planner.menu[one.plan.level].patch_ratio < 1
            pixels = tuple(image.picture.pixels for image in request.images) if partly else ()
            self._waiting.append(Sample(one.plan.level, tuple(request.prompt), images, tuple(answer), pixels))

    @property
    def visual_tokens(self) -> int:
        """Of the picture that the next step may encode."""
        sample = self._checked
        return sample.images[len(self._seen)][1].visual_tokens if sample and self._unseen(sample) else 0

    def give_way(self) -> None:
        """Forget the answer that is being checked: somebody has come."""
        self._checked = self._left = None
        self._seen = []
        self._kv.free(ID)

    def step(self) -> None:
        """One small pass of a check. An error ends the check alone."""
        try:
            self._checked = sample = self._checked or self._waiting.popleft()
            if self._unseen(sample):
                self._see(sample)
            elif self._left is None:
                self._begin(sample)
            else:
                self._go_on(sample, self._left)
        except Exception:
            log.exception("an answer could not be checked against level off")
            self.give_way()

    def _unseen(self, sample: Sample) -> int:
        return len(sample.images) - len(self._seen)

    def _see(self, sample: Sample) -> None:
        """The features of a picture as the whole tower sees it. One that is forgotten is encoded if the level saw less of it; else
        the check ends."""
        place = len(self._seen)
        digest, layout = sample.images[place]
        features = self._prefill.known(digest, layout)
        if features is None and sample.pixels:
            features = self._model.encode(sample.pixels[place], layout)
        if features is None:
            self.give_way()
        else:
            self._seen.append(features)

    def _begin(self, sample: Sample) -> None:
        """Lay out prompt and answer, unless the rows do not fit."""
        plan = self._planner.plan("off", ID, sample.prompt, self._seen)
        rows = plan.route.rows(len(sample.prompt) + len(sample.answer))
        if sum(rows) > self._kv.budget:
            self.give_way()
            return
        ids = torch.tensor([*sample.prompt, *sample.answer[:-1]], device=self._model.device)
        cache = self._kv.allocate(ID, rows)
        self._left = prefill_input(self._model, ids, plan.visual, plan.route, cache, logits_to_keep=len(sample.answer))

    def _go_on(self, sample: Sample, left: SequenceInput) -> None:
        more = len(left) - left.logits_to_keep
        if more > 0:
            rows = min(more, MAX_TOKENS)
            forward(self._model, [left.first(rows)])
            self._left = left.behind(rows)
            return
        likeliest = forward(self._model, [left]).argmax(-1).tolist()
        self._metrics.shadow_compared.labels(sample.level).inc()
        self._metrics.shadow_equal.labels(sample.level).inc(likeliest == list(sample.answer))
        self.give_way()
