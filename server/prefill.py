"""What a request needs before its first pass: image features, a route, and the rows of its prompt that are not in the cache yet."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.families import Layout
from models.forward import prefill_input
from models.kv_cache import Prefix, PrefixCache, RequestCache
from models.route import Route
from models.vision.features import ImageFeatures
from pruning.dynamic.planner import Plan, Planner
from server.confidence import Confidence, YesNo
from server.detokenize import Detokenizer, LogprobQueue
from server.load import WorkRate
from server.metrics import Metrics
from server.request import PreparedImage, Receipt, Request
from server.route_detail import explain
from server.running import Running
from server.sampling import new_generator

log = logging.getLogger("espalier.engine")


class Prefill:
    """Makes waiting requests into running ones; remembers image features and beginnings of prompts for those that follow."""

    def __init__(
        self, checkpoint: Checkpoint, planner: Planner, metrics: Metrics, work: WorkRate, *, default_level: str,
        cached_images: int, prefix_rows: int,
    ) -> None:  # fmt: skip
        self._checkpoint, self._planner, self._metrics, self._work = checkpoint, planner, metrics, work
        self._default_level, self._cached_images = default_level, cached_images
        self._features: OrderedDict[tuple[str, Layout, float], ImageFeatures] = OrderedDict()
        self._prefixes = PrefixCache(prefix_rows)
        self._yes_no = YesNo(checkpoint.preprocessor.vocab_size, checkpoint.preprocessor.token_bytes)

    def plan(self, request: Request, features: Sequence[ImageFeatures]) -> Plan:
        """Plan the route; the request's level becomes that of the plan."""
        started = time.monotonic()
        plan = self._planner.plan(request.level, request.reason, request.prompt, features, follow_up=request.follow_up)
        if self._patch_ratio(plan.level) != self._patch_ratio(request.level):  # the router failed: `off` has the whole tower
            whole = [self.encode(image, plan.level) for image in request.images]
            plan = self._planner.plan(plan.level, plan.reason, request.prompt, whole)
        request.timings["route"] = time.monotonic() - started
        if plan.level != request.level:
            log.warning("request %s runs at level %s: %s", request.id, plan.level, plan.reason)
            if not request.parent.routed:
                self._metrics.degradations.labels(request.level, plan.level).inc()
            request.level = plan.level
        elif request.reason == "load" and not request.parent.routed:
            self._metrics.degradations.labels(self._default_level, request.level).inc()
        elif request.reason == "deadline" and not request.parent.routed:
            self._metrics.deadline_levels.labels(request.level).inc()
        return plan

    def begin(
        self, request: Request, plan: Plan, features: Sequence[ImageFeatures], cache: RequestCache, max_new_tokens: int
    ) -> Running:
        """Lay out the prompt's rows, behind those that the cache of beginnings has."""
        model, preprocessor, sampling = self._checkpoint.model, self._checkpoint.preprocessor, request.sampling
        ids = torch.tensor(request.prompt, device=model.device)
        prompt = prefill_input(model, ids, plan.visual, plan.route, cache)
        prefix = self._find_prefix(request, plan)
        if prefix:
            cache.begin_with(prefix.layers)
            prompt = prompt.behind(prefix.rows)
        receipt = _receipt(plan, self._checkpoint.fingerprint)
        if request.detail:
            receipt = replace(receipt, detail=explain(self._planner, plan, features, len(request.prompt)))
        if not request.parent.routed:
            request.parent.routed = True
            self._metrics.routed(receipt, len(request.prompt))
        ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._checkpoint.eos)
        return Running(
            request, plan, receipt, cache, prompt, max_new_tokens, ends=ends, cached_rows=prefix.rows if prefix else 0,
            text=Detokenizer(preprocessor.token_bytes, sampling.stop, request.continues),
            generator=new_generator(sampling.seed), logprobs=LogprobQueue(request.continues),
            confidence=Confidence(request, self._yes_no, preprocessor.token_bytes, ends, max_new_tokens),
        )  # fmt: skip

    def encode(self, image: PreparedImage, level: str) -> ImageFeatures:
        """An image's features [1, visual_tokens, width] as a level's tower sees it, remembered by content and share of patches."""
        picture, ratio = image.picture, self._patch_ratio(level)
        key = (image.digest, picture.layout, ratio)
        features = self._features.get(key)
        self._metrics.cache_queries.labels("image").inc()
        if features is None:
            started = time.monotonic()
            features = self._checkpoint.model.encode(picture.pixels, picture.layout, ratio)
            self._work.visual_token.observe(time.monotonic() - started, picture.layout.visual_tokens)
        else:
            self._metrics.cache_hits.labels("image").inc()
        self._features[key] = features
        self._features.move_to_end(key)
        while len(self._features) > self._cached_images:
            self._features.popitem(last=False)
        return features

    def _patch_ratio(self, level: str) -> float:
        return self._planner.menu[level].patch_ratio

    def known(self, digest: str, layout: Layout) -> ImageFeatures | None:
        """The features, by the whole tower, of an image that has not been forgotten."""
        return self._features.get((digest, layout, 1.0))

    def _find_prefix(self, request: Request, plan: Plan) -> Prefix | None:
        """What an earlier request left of the same beginning at the same route."""
        if plan.visual is None:
            return None
        self._metrics.cache_queries.labels("prefix").inc()
        prefix = self._prefixes.find(self._prefix_key(request, plan), _shown(plan))
        if prefix and prefix.rows == len(request.prompt) - plan.route.dropped:
            prefix = None  # a pass needs a row, whose logits are the answer's
        if prefix:
            self._metrics.cache_hits.labels("prefix").inc()
        return prefix

    def keep_prefix(self, one: Running) -> None:
        """Remember the beginning of a prompt that has run."""
        if one.plan.visual is None or one.cached_rows:
            return
        key = self._prefix_key(one.request, one.plan)
        rows = len(key[-1]) - one.plan.route.dropped
        if rows < len(one.request.prompt) - one.plan.route.dropped:
            self._prefixes.keep(key, Prefix(rows, _shown(one.plan), one.cache.beginning(rows)))

    def _prefix_key(self, request: Request, plan: Plan) -> tuple[str, Route, tuple[int, ...]]:
        """Whose it is, its route, and its tokens up to the last visual one."""
        end = len(request.prompt) - request.prompt[::-1].index(self._checkpoint.model.config.image_token_id)
        return request.parent.caller.tenant, plan.route, tuple(request.prompt[:end])


def _shown(plan: Plan) -> Tensor:
    """The visual tokens that run, [kept, width]: the others would only fill memory."""
    assert plan.visual is not None
    return plan.visual[list(plan.route.kept_tokens)] if plan.route.dropped else plan.visual


def _receipt(plan: Plan, fingerprint: str) -> Receipt:
    route, expected = plan.route, plan.expected_agreement
    return Receipt(
        level=plan.level, reason=plan.reason, visual_tokens=len(route.kept_tokens), visual_tokens_total=route.visual_tokens,
        layers=sum(route.layers), layers_total=len(route.layers), frozen_layers=len(route.frozen_layers),
        flops_ratio=round(plan.flops_ratio, 4), expected_agreement=None if expected is None else round(expected, 4),
        checkpoint=fingerprint,
    )  # fmt: skip
