"""Traces and metrics by OpenTelemetry, for those who install the extra `otel`: one span a request, made when it has ended.

Names are those of the GenAI conventions, and `gen_ai.latency.*` of vLLM and SGLang. What only we have is `espalier.*`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.request import Receipt, Request
from server.version import version

# What the conventions advise.
_DURATIONS = tuple(0.01 * 2**power for power in range(14))
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_STAGES = ("image", "queue", "encode", "route", "prefill")
"""In the order in which a request passes them."""
_RECEIPT = ("visual_tokens", "visual_tokens_total", "layers", "layers_total", "frozen_layers", "flops_ratio", "expected_agreement")


class Tracing:
    """Spans go to `spans`, metrics to `readers`; both are the SDK's, so its OTEL_* variables count too."""

    def __init__(self, spans: SpanProcessor, readers: Sequence[MetricReader]) -> None:
        resource = Resource.create({"service.name": "espalier", "service.version": version()})
        self._tracers = TracerProvider(resource=resource)
        self._tracers.add_span_processor(spans)
        self._meters = MeterProvider(readers, resource=resource)
        self._tracer = self._tracers.get_tracer("espalier", version())
        meter = self._meters.get_meter("espalier", version())
        self._duration, self._first_token, self._per_token = (
            meter.create_histogram(f"gen_ai.server.{name}", unit="s", explicit_bucket_boundaries_advisory=buckets)
            for name, buckets in (
                ("request.duration", _DURATIONS), ("time_to_first_token", _FIRST_TOKEN), ("time_per_output_token", _PER_TOKEN)
            )
        )  # fmt: skip

    @classmethod
    def over_otlp(cls, endpoint: str) -> Tracing:
        """To a collector's OTLP/HTTP address, such as http://localhost:4318."""
        base = endpoint.rstrip("/")
        spans = BatchSpanProcessor(OTLPSpanExporter(f"{base}/v1/traces"))
        return cls(spans, [PeriodicExportingMetricReader(OTLPMetricExporter(f"{base}/v1/metrics"))])

    def stop(self) -> None:
        """Send what is left."""
        self._tracers.shutdown()
        self._meters.shutdown()

    def ended(self, request: Request, model: str, receipt: Receipt | None) -> None:
        """A client's request has ended, with all its choices; `receipt` is None if it never ran."""
        now, parent = time.monotonic(), request.parent
        started = time.time_ns() - int((now - request.created) * 1e9)
        common = _common(request, model)
        if "error.type" in common or not request.withheld:
            self.record(request, model, now)
        span = self._tracer.start_span(
            f"{common['gen_ai.operation.name']} {common['gen_ai.request.model']}",
            context=TraceContextTextMapPropagator().extract(parent.caller.trace),
            kind=SpanKind.SERVER,
            start_time=started,
            attributes={**common, **_asked(request), **_answered(request, receipt), **_latencies(request, now)},
        )
        at = started
        for stage in (stage for stage in _STAGES if stage in request.timings):
            at += int(request.timings[stage] * 1e9)
            span.add_event(stage, {"seconds": request.timings[stage]}, timestamp=at)
        if parent.first_token is not None:
            span.add_event("first_token", timestamp=started + int((parent.first_token - request.created) * 1e9))
        if parent.outcome == "error":
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def record(self, request: Request, model: str, now: float) -> None:
        """The times of a request that has ended now, as its client saw them."""
        parent, attributes = request.parent, _common(request, model)
        self._duration.record(now - request.created, attributes)
        if parent.first_token is not None:
            self._first_token.record(parent.first_token - request.created, attributes)
            if parent.choices == 1 and parent.new_tokens > 1:
                self._per_token.record((now - parent.first_token) / (parent.new_tokens - 1), attributes)


def _common(request: Request, model: str) -> dict[str, Any]:
    told = {
        "gen_ai.operation.name": "text_completion" if request.id.startswith("cmpl-") else "chat",
        "gen_ai.provider.name": "espalier",
        "gen_ai.request.model": request.parent.model or model,
        "gen_ai.response.model": model,
    }
    failed = request.parent.outcome in ("abort", "error")
    return told | {"error.type": request.parent.outcome} if failed else told


def _asked(request: Request) -> dict[str, Any]:
    sampling = request.sampling
    told = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": request.parent.choices if request.parent.choices > 1 else None,
        "http.request.header.x-request-id": request.parent.caller.request_id or None,
    }
    return {name: value for name, value in told.items() if value is not None}


def _answered(request: Request, receipt: Receipt | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "gen_ai.response.id": request.id.rpartition("-")[0] or request.id,
        "gen_ai.response.finish_reasons": [request.parent.outcome],
        "gen_ai.usage.input_tokens": len(request.prompt),
        "gen_ai.usage.output_tokens": request.parent.new_tokens,
        "espalier.pruning.level": request.level,
        "espalier.pruning.reason": request.reason,
    }
    if receipt:
        told |= {f"espalier.pruning.{name}": getattr(receipt, name) for name in _RECEIPT if getattr(receipt, name) is not None}
    return told


def _latencies(request: Request, now: float) -> dict[str, float]:
    timings, first = request.timings, request.parent.first_token
    told = {"e2e": now - request.created}
    if "queue" in timings:
        told["time_in_queue"] = timings["queue"]
    if "prefill" in timings:
        told["time_in_model_prefill"] = timings["prefill"]
    if first is not None:
        decode = now - first
        told |= {"time_to_first_token": first - request.created, "time_in_model_decode": decode}
        told["time_in_model_inference"] = timings.get("prefill", 0.0) + decode
    return {f"gen_ai.latency.{name}": seconds for name, seconds in told.items()}
