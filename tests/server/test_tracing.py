"""Spans and metrics as a collector receives them, over OTLP; and log lines for machines."""

from __future__ import annotations

import gzip
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from checkpoints.world import draw
from models.checkpoint import Checkpoint
from server import run
from server.engine import Engine, Limits
from server.logs import JsonFormatter
from server.tracing import Tracing
from tests.server.client import app_of, image_part
from tests.server.fake_engine import data_url
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint

pytestmark = pytest.mark.anyio
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SECRET = "What secret color is the star?"


class Collector(ThreadingHTTPServer):
    """Takes what an exporter posts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.received: list[tuple[str, bytes]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> list[Any]:
        posted = [ExportTraceServiceRequest.FromString(body) for path, body in self.received if path == "/v1/traces"]
        return [span for one in posted for of in one.resource_spans for scope in of.scope_spans for span in scope.spans]

    def metrics(self) -> dict[str, Any]:
        posted = [ExportMetricsServiceRequest.FromString(body) for path, body in self.received if path == "/v1/metrics"]
        return {metric.name: metric for one in posted for of in one.resource_metrics for scope in of.scope_metrics
                for metric in scope.metrics}  # fmt: skip


class CollectorHandler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


@pytest.fixture
def traced(tiny: Checkpoint, collector: Collector) -> Iterator[Engine]:
    tracing = Tracing.over_otlp(collector.url)
    engine = Engine(tiny, Limits(kv_rows=20_000), tracing=tracing)
    engine.start()
    engine.flush = tracing.stop  # type: ignore[attr-defined]
    yield engine
    engine.stop()


async def ask(engine: Engine, path: str = "/v1/chat/completions", *, headers: Any = None, **fields: Any) -> httpx.Response:
    picture = io.BytesIO()
    draw("validation", 0).image.save(picture, "PNG")
    content = [image_part(data_url(picture.getvalue())), {"type": "text", "text": SECRET}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "ignore_eos": True, **fields}
    if path == "/v1/completions":
        body = {"prompt": SECRET, "max_tokens": 4, **fields}
    transport = httpx.ASGITransport(app_of(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://espalier") as client:
        return await client.post(path, json=body, headers=headers)


def flush(engine: Engine) -> None:
    engine.stop()
    engine.flush()  # type: ignore[attr-defined]


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


async def test_a_span_tells_every_stage_and_joins_the_callers_trace(traced: Engine, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "ticket-7"}
    reply = await ask(traced, model=f"{traced.model_name}@strong", temperature=0.5, seed=3, headers=headers)
    flush(traced)
    (span,) = collector.spans()
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == f"chat {traced.model_name}@strong"
    told = attributes(span)
    assert told["gen_ai.response.id"] == reply.json()["id"]
    assert told["gen_ai.request.model"] == f"{traced.model_name}@strong" and told["gen_ai.response.model"] == traced.model_name
    assert (told["gen_ai.request.temperature"], told["gen_ai.request.seed"], told["gen_ai.request.max_tokens"]) == (0.5, 3, 4)
    assert told["gen_ai.usage.input_tokens"] == reply.json()["usage"]["prompt_tokens"]
    assert told["gen_ai.usage.output_tokens"] == 4
    assert told["http.request.header.x-request-id"] == "ticket-7"
    assert told["espalier.pruning.level"] == "strong" and told["espalier.pruning.visual_tokens"] == 24
    events = {event.name: event.time_unix_nano for event in span.events}
    assert list(events) == ["image", "queue", "encode", "route", "prefill", "first_token"]
    assert span.start_time_unix_nano <= min(events.values()) and max(events.values()) <= span.end_time_unix_nano
    latencies = {name: seconds for name, seconds in told.items() if name.startswith("gen_ai.latency.")}
    assert len(latencies) == 6 and all(0 <= seconds <= latencies["gen_ai.latency.e2e"] for seconds in latencies.values())


async def test_no_span_or_metric_holds_content(traced: Engine, collector: Collector) -> None:
    reply = await ask(traced)
    flush(traced)
    answer = reply.json()["choices"][0]["message"]["content"]
    posted = b"".join(body for _, body in collector.received)
    assert len(collector.received) >= 2 and b"secret" not in posted and answer.encode() not in posted


async def test_the_conventions_metrics_are_sent(traced: Engine, collector: Collector) -> None:
    for _ in range(2):
        await ask(traced)
    flush(traced)
    metrics = collector.metrics()
    names = ("request.duration", "time_to_first_token", "time_per_output_token")
    assert set(metrics) == {f"gen_ai.server.{name}" for name in names}
    for metric in metrics.values():
        (point,) = metric.histogram.data_points
        assert (metric.unit, point.count) == ("s", 2)
        assert {one.key for one in point.attributes} >= {"gen_ai.operation.name", "gen_ai.provider.name", "gen_ai.request.model"}


async def test_several_choices_are_one_span(traced: Engine, collector: Collector) -> None:
    await ask(traced, n=3, temperature=1.0)
    flush(traced)
    (span,) = collector.spans()
    assert attributes(span)["gen_ai.request.choice.count"] == 3
    assert attributes(span)["gen_ai.usage.output_tokens"] == 12


@pytest.mark.parametrize(("below", "spans"), [(1, 2), (0, 1)])
async def test_an_answer_made_again_is_timed_once(traced: Engine, collector: Collector, below: float, spans: int) -> None:
    """As the client saw it; each of the two has its span."""
    await ask(traced, pruning={"level": "strong", "escalate_below": below})
    flush(traced)
    metrics = collector.metrics()
    for name in ("request.duration", "time_to_first_token"):
        assert [point.count for point in metrics[f"gen_ai.server.{name}"].histogram.data_points] == [1]
    assert len(collector.spans()) == spans


async def test_a_completion_without_a_trace_starts_its_own(traced: Engine, collector: Collector) -> None:
    await ask(traced, "/v1/completions", headers={"traceparent": "nonsense"})
    flush(traced)
    (span,) = collector.spans()
    assert not span.parent_span_id and span.name.startswith("text_completion ")


async def test_a_failure_is_an_error(traced: Engine, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "_plan", lambda request: 1 / 0)
    assert (await ask(traced)).status_code == 500
    flush(traced)
    (span,) = collector.spans()
    assert span.status.code == Status.STATUS_CODE_ERROR and attributes(span)["error.type"] == "error"


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.tracing", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[otel\]'"):
        run.start_tracing("http://localhost:4318")


# ---- logs for machines


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel("INFO")
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


async def test_a_request_is_one_json_line(traced: Engine, lines: io.StringIO) -> None:
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "ticket-7"}
    reply = await ask(traced, pruning={"level": "strong"}, headers=headers)
    flush(traced)
    (line,) = [one for one in map(json.loads, lines.getvalue().splitlines()) if one["logger"].startswith("espalier")]
    assert (line["request_id"], line["trace_id"], line["outcome"], line["pruning_level"]) == ("ticket-7", TRACE, "length", "strong")
    assert (line["prompt_tokens"], line["new_tokens"], line["visual_tokens"]) == (reply.json()["usage"]["prompt_tokens"], 4, 24)
    assert set(line["stages"]) == {"image", "queue", "encode", "route", "prefill", "decode"} and line["seconds"] > 0
    assert "secret" not in lines.getvalue() and reply.json()["choices"][0]["message"]["content"] not in lines.getvalue()


async def test_a_refusal_is_one_json_line(traced: Engine, lines: io.StringIO) -> None:
    reply = await ask(traced, pruning={"level": "secret"})
    flush(traced)
    (line,) = [one for one in map(json.loads, lines.getvalue().splitlines()) if one["logger"].startswith("server")]
    assert line["request_id"] == reply.headers["x-request-id"]
    assert (line["status"], line["reason"], line["severity"]) == (400, "unknown_pruning_level", "INFO")


def test_an_exception_is_within_its_line() -> None:
    try:
        raise RuntimeError("no\nluck")
    except RuntimeError:
        record = logging.LogRecord("espalier", logging.ERROR, "", 0, "request %s failed", ("a",), sys.exc_info())
    line = json.loads(JsonFormatter().format(record))
    assert line["message"] == "request a failed" and "RuntimeError: no\nluck" in line["exception"]
