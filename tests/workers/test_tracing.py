"""Traces are sent where the environment says, and cost nothing where it says nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.planning.plan import PlanOptions
from tests.checkpoints import fine_tune, llama_tensors
from tests.workers.execute import plan, write_models
from tests.workers.test_entry import payloads
from workers import entry, tracing
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def child(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    command = [sys.executable, "-c", f"from workers import tracing; {code}"]
    return subprocess.run(
        command, env={**clean, **env}, capture_output=True, text=True, timeout=60, check=True
    )


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP collector: where it is, and what it was sent."""
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces"
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_spans_reach_a_collector(collector: tuple[str, list[Any]]) -> None:
    url, received = collector
    child(
        "tracing.configure('worker'); tracing.configure('again')\n"
        f"tracing.adopt({CALLER!r})\n"
        "with tracing.span('read', {'mergemill.part': 'p'}) as span: print(span.traceparent)",
        OTEL_EXPORTER_OTLP_ENDPOINT=url,
        OTEL_EXPORTER_OTLP_COMPRESSION="none",
    )
    (request,) = received
    (of_process,) = request.resource_spans
    assert {each.key: each.value.string_value for each in of_process.resource.attributes}["service.name"] == (
        "mergemill-worker"
    )
    (span,) = of_process.scope_spans[0].spans
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == (
        "read",
        CALLER[3:35],
        CALLER[36:52],
    )


def test_a_task_s_stages_are_within_the_span_that_it_was_given(tmp_path: Path) -> None:
    models = {"base": llama_tensors(1), "a": fine_tune(llama_tensors(1), 1)}
    write_models(tmp_path, models)
    planned = plan(tmp_path, "linear", ["a"], {}, PlanOptions(shard_bytes=60_000))
    asked = payloads(LocalStore(), planned, tmp_path / "out")
    for number, payload in enumerate(asked):
        payload["ids"] = {"traceparent": f"00-{7:032x}-{number + 1:016x}-01"}
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    try:
        assert len(dict(entry.tasks(asked))) == len(asked) > 2
    finally:
        tracing.use(None)
        provider.shutdown()
    found: dict[int, list[str]] = {}
    for span in exporter.get_finished_spans():
        assert span.parent is not None
        assert span.parent.trace_id == 7
        found.setdefault(span.parent.span_id, []).append(span.name)
    assert found == {number + 1: ["read", "merge", "digest", "write"] for number in range(len(asked))}


def test_without_an_endpoint_nothing_is_imported_and_nothing_is_done() -> None:
    done = child(
        "import sys; tracing.configure('api')\n"
        f"tracing.adopt({CALLER!r})\n"
        "with tracing.span('a') as span: print(span.traceparent, tracing.traceparent())\n"
        "tracing.begin('b').end(ValueError()); tracing.traced('c')(print)('called')\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    assert done.stdout == "None None\ncalled\n[]\n"


def test_without_the_extra_it_is_said_once_and_work_goes_on() -> None:
    done = child(
        "import sys; sys.modules['opentelemetry.sdk.resources'] = None\n"
        "tracing.configure('api'); tracing.configure('api')\n"
        "with tracing.span('a') as span: print(span.traceparent)",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
    )
    assert done.stdout == "None\n"
    assert done.stderr.count("mergemill[otel]") == 1


def test_a_span_that_failed_tells_no_secret() -> None:
    provider = TracerProvider()
    tracing.use(provider)
    try:
        with pytest.raises(ValueError, match="hunter2"), tracing.span("a") as span:
            raise ValueError("at redis://:hunter2@host")
        assert span._span.status.description == "at redis://:***@host"
        assert span._span.end_time is not None
        for odd in ("", "nonsense", "00-0-0-0", CALLER + "x" * 1000):
            with tracing.span("b", parent=odd) as orphan:
                assert orphan._span.parent is None
    finally:
        tracing.use(None)
        provider.shutdown()
