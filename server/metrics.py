"""Prometheus metrics: prefix `espalier_`, base units, bounded labels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from pruning.dynamic.levels import Level
from server.errors import rejection_reasons
from server.request import Receipt

disable_created_metrics()  # type: ignore[no-untyped-call]  # a timestamp beside every counter doubles the page and nobody reads it

# From a short answer on a GPU to a long one behind a queue on a CPU.
_SECONDS = (
    0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60,
)  # fmt: skip
_STAGE = (0.0005, 0.001, 0.0025, *_SECONDS)
# A router's own work counts, so a request that keeps everything costs a little more than 1.
_RATIO = (*(twentieth / 20 for twentieth in range(1, 23)), 1.25, 1.5)
_AGREEMENT = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)


STAGES = ("queue", "image", "encode", "route", "prefill", "decode")
OUTCOMES = ("stop", "length", "abort", "error")
"""How a request may end, the worse the later."""


class Metrics:
    """An engine's own, in a registry of its own, so that two in one process do not share numbers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"espalier_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"espalier_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"espalier_{name}", text, labels, registry=registry, buckets=buckets)

        self.requests = counter("requests_total", "Requests that ended; one with n choices counts once.", "level", "outcome")
        self.request_seconds = histogram("request_seconds", "From arrival to the last token.", _SECONDS, "level")
        self.first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS, "level"
        )
        self.inter_token = histogram("inter_token_seconds", "Between tokens of one answer.", _SECONDS, "level")
        self.stage = histogram("stage_seconds", "Time in each stage of a request.", _STAGE, "stage")
        self.running = gauge("requests_running", "Choices in the batch.")
        self.waiting = gauge("requests_waiting", "Choices in the queue.")
        self.kv_usage = gauge("kv_cache_usage_ratio", "Reserved rows of the KV cache over all.")
        self.saturation = gauge(
            "saturation_ratio", "Choices that run or wait over what fits, in places or in KV cache; above 1 some must wait."
        )
        self.backlog = gauge("backlog_seconds", "Estimated work of the queue at the levels asked for.")
        self.busy = counter("engine_busy_seconds_total", "Time in which the engine computed.")
        self.visual_tokens = counter("visual_tokens_total", "Visual tokens kept and dropped.", "level", "outcome")
        self.layers = counter("layers_total", "Layers run, of those: frozen for visual tokens, and skipped.", "level", "outcome")
        self.flops = histogram("flops_ratio", "Prefill FLOPs over the dense ones, language model.", _RATIO, "level")
        self.expected = histogram(
            "expected_agreement_ratio", "Predicted probability that an answer is the un-pruned model's.", _AGREEMENT, "level"
        )
        self.weight_sparsity = gauge("weight_sparsity_ratio", "Zeros among a module's weights.", "module")
        self.weight_bytes = gauge("weight_bytes", "Resident bytes of the weights by format.", "format")
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens before pruning.")
        self.generated_tokens = counter("generated_tokens_total", "Tokens made.")
        self.cache_queries = counter("cache_queries_total", "Look-ups in a cache.", "cache")
        self.cache_hits = counter("cache_hits_total", "Look-ups that found what they sought.", "cache")
        self.degradations = counter("degradations_total", "Requests that ran at another level than theirs.", "from", "to")

        self.deadline_levels = counter(
            "deadline_levels_total", "Requests that ran at this level, cheaper than theirs, to make their deadline.", "level"
        )
        self.shadow_compared = counter("shadow_compared_total", "Answers that were checked against level off.", "level")
        self.shadow_equal = counter("shadow_equal_total", "Those of them that are the same at level off.", "level")
        self.escalations = counter(
            "escalations_total", "Answers made again because they were not sure enough; each counts at both levels.", "from", "to"
        )

        served = ("version", "model", "checkpoint", "dtype", "device")
        self.build_info = gauge("build_info", "1, with what is served as labels.", *served)

    def watch_load(
        self, running: Callable[[], float], waiting: Callable[[], float], kv: Callable[[], float],
        saturation: Callable[[], float], backlog: Callable[[], float],
    ) -> None:  # fmt: skip
        """Read the load gauges when scraped, not when they change."""
        self.running.set_function(running)
        self.waiting.set_function(waiting)
        self.kv_usage.set_function(kv)
        self.saturation.set_function(saturation)
        self.backlog.set_function(backlog)

    def loaded(self, held: dict[str, int], sparsity: dict[str, float], **build: str) -> None:
        """What is served, once it is loaded: bytes by weight format, zeros by module, and the labels of `build_info`."""
        for format, size in held.items():
            self.weight_bytes.labels(format).set(size)
        for module, share in sparsity.items():
            self.weight_sparsity.labels(module).set(share)
        self.build_info.labels(**build).set(1)

    def start_at_zero(self, menu: Mapping[str, Level]) -> None:
        """Make every labelled series now, so that an alert sees the first change."""
        fullest = max(menu.values(), key=lambda level: level.visual_ratio).name
        for name, level in menu.items():
            if name != fullest:
                self.escalations.labels(name, fullest)
            self.deadline_levels.labels(name)
            if name != "off":
                self.shadow_compared.labels(name)
                self.shadow_equal.labels(name)
            for outcome in OUTCOMES:
                self.requests.labels(name, outcome)
            for histogram in (self.request_seconds, self.first_token, self.inter_token, self.flops):
                histogram.labels(name)
            for outcome in ("kept", "dropped"):
                self.visual_tokens.labels(name, outcome)
            for outcome in ("run", "skipped", "frozen"):
                self.layers.labels(name, outcome)
            if level.routed:
                self.expected.labels(name)
                self.degradations.labels(name, "off")
        for stage in STAGES:
            self.stage.labels(stage)
        for cache in ("image", "prefix"):
            self.cache_queries.labels(cache)
            self.cache_hits.labels(cache)

    def routed(self, receipt: Receipt, prompt_tokens: int) -> None:
        """A request's route is made; one with n choices tells it once."""
        level = receipt.level
        self.visual_tokens.labels(level, "kept").inc(receipt.visual_tokens)
        self.visual_tokens.labels(level, "dropped").inc(receipt.visual_tokens_total - receipt.visual_tokens)
        self.layers.labels(level, "run").inc(receipt.layers)
        self.layers.labels(level, "skipped").inc(receipt.layers_total - receipt.layers)
        self.layers.labels(level, "frozen").inc(receipt.frozen_layers)
        self.flops.labels(level).observe(receipt.flops_ratio)
        self.prompt_tokens.inc(prompt_tokens)
        if receipt.expected_agreement is not None:
            self.expected.labels(level).observe(receipt.expected_agreement)

    def finished(self, level: str, outcome: str, timings: dict[str, float]) -> None:
        """A request ended: outcome stop, length, abort or error."""
        self.requests.labels(level, outcome).inc()
        for stage, value in timings.items():
            self.stage.labels(stage).observe(value)


class ServerMetrics(Collector):
    """All that `/metrics` tells: the process, refusals, and what the engines tell, with their model's name as a label. Engines of
    one name, of which all but the last end what they have accepted, are told as one."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._engines: list[tuple[str, Metrics]] = []  # the oldest first
        self._ended: dict[str, list[Metric]] = {}  # counts of engines that are gone, while others have their model's name
        self._changing = threading.Lock()
        self._rejections = Counter(
            "rejections_total", "Requests refused, by reason.", ["reason"], "espalier", registry=self.registry
        )
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        for reason in rejection_reasons():
            self._rejections.labels(reason)

    def rejected(self, reason: str) -> None:
        self._rejections.labels(reason).inc()

    def add(self, model: str, metrics: Metrics) -> None:
        """Tell of an engine too."""
        with self._changing:
            self._engines.append((model, metrics))

    def end(self, model: str, metrics: Metrics) -> None:
        """An engine is gone. What it counted stays in the sums while its model has its name: a counter falls at restarts only."""
        counts = [family for family in _told(model, metrics) if family.type != "gauge"]
        with self._changing:
            self._engines.remove((model, metrics))
            ended = _merged([*self._ended.pop(model, ()), *counts])
            if model in dict(self._engines):
                self._ended[model] = ended

    def collect(self) -> Iterator[Metric]:
        yield from self.registry.collect()
        with self._changing:
            ended, engines = [*self._ended.values()], [*self._engines]
        yield from _merged([*chain(*ended), *chain(*(_told(*engine) for engine in engines))])


def _told(model: str, metrics: Metrics) -> Iterator[Metric]:
    """What an engine tells, with its model's name."""
    for family in metrics.registry.collect():
        family.samples = [one._replace(labels={"model_name": model, **one.labels}) for one in family.samples]
        yield family


def _merged(families: Iterable[Metric]) -> list[Metric]:
    """Each metric once. Amounts with equal labels are added up; of ratios and what is served the last one stays."""
    merged: dict[str, Metric] = {}
    samples: dict[tuple[str, ...], Sample] = {}
    for family in families:
        merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
        adds = family.type != "gauge" or not family.name.endswith(("_ratio", "_info"))
        for one in family.samples:
            key = family.name, one.name, *one.labels.values()
            samples[key] = one._replace(value=samples[key].value + one.value) if adds and key in samples else one
    for (name, *_), one in samples.items():
        merged[name].samples.append(one)
    return [*merged.values()]
