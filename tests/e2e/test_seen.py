"""One merge, seen from everywhere: its log lines, its error, its metrics and its trace, in every process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from api.app import create_app
from service.cluster.driver import Driver
from service.jobs.jobstore import JobStore
from service.running.scheduler import Scheduler
from service.settings import Settings
from service.watching import metrics
from tests.api.conftest import serving
from tests.checkpoints import fine_tune, llama_tensors, write_checkpoint
from tests.e2e.bench import LocalDriver
from tests.servers.service import RunningService
from workers import tracing

pytestmark = pytest.mark.valkey

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
STAGES = {"read", "merge", "digest", "write"}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """Two small models and their base."""
    base = llama_tensors(1)
    for name, tensors in {"base": base, "a": fine_tune(base, 1), "b": fine_tune(base, 2)}.items():
        write_checkpoint(tmp_path / name, tensors)
    models = [{"model": str(tmp_path / name), "parameters": {"density": 0.5}} for name in "ab"]
    return {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": models}


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """Every span that ends."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    try:
        yield exporter
    finally:
        tracing.use(None)
        provider.shutdown()


@pytest.fixture
def small(valkey_url: str, valkey_namespace: str) -> Iterator[tuple[httpx.Client, JobStore]]:
    """API and scheduler in this process, and a fleet that is a function call."""
    settings = Settings(redis_url=valkey_url, namespace=valkey_namespace, auth="off", poll_seconds=0.01)
    with JobStore(valkey_url, valkey_namespace) as jobs, serving(create_app(settings)) as client:
        scheduler = Scheduler(settings, jobs, LocalDriver())  # type: ignore[arg-type]
        thread = threading.Thread(target=scheduler.run)
        thread.start()
        try:
            yield client, jobs
        finally:
            scheduler.stop()
            thread.join()


def merged(client: httpx.Client, recipe: dict[str, Any], output: Path, **headers: str) -> dict[str, Any]:
    body = {"recipe": recipe, "output": str(output), "options": {"shard_bytes": 60_000}}
    answer = client.post("/v1/merges", json=body, headers={"X-Request-Id": "mine", **headers})
    assert answer.status_code == 202, answer.text
    deadline = time.monotonic() + 60
    while True:
        found: dict[str, Any] = client.get(f"/v1/merges/{answer.json()['id']}").json()
        if found["state"] in {"succeeded", "failed", "cancelled"}:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.02)


def tree(finished: tuple[ReadableSpan, ...], root: int) -> dict[str, Any]:
    """Names below a span; those of the same name together."""
    found: dict[str, Any] = {}
    for span in finished:
        if span.parent is not None and span.parent.span_id == root and span.context is not None:
            found.setdefault(span.name, []).append(tree(finished, span.context.span_id))
    return found


def test_a_merge(
    small: tuple[httpx.Client, JobStore],
    recipe: dict[str, Any],
    tmp_path: Path,
    lines: list[dict[str, Any]],
    spans: InMemorySpanExporter,
) -> None:
    client, jobs = small
    names = [
        ("mergemill_parts_done_total", {}),
        ("mergemill_written_bytes_total", {}),
        ("mergemill_job_duration_seconds_count", {"state": "succeeded"}),
        ("mergemill_part_stage_duration_seconds_count", {"stage": "write"}),
        ("mergemill_worker_peak_memory_ratio_count", {}),
    ]
    before = [metrics.SCHEDULER.get_sample_value(*name) or 0.0 for name in names]
    job = merged(client, recipe, tmp_path / "out", traceparent=CALLER)
    assert job["state"] == "succeeded", job["error"]
    record = jobs.get(job["id"])
    parts = record.parts_total
    assert parts > 3

    deadline = time.monotonic() + 20
    while not any(span.name == "job" for span in spans.get_finished_spans()):  # it ends after its record does
        assert time.monotonic() < deadline
        time.sleep(0.01)
    after = [metrics.SCHEDULER.get_sample_value(*name) or 0.0 for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [parts, record.bytes_total, 1, parts, parts]

    (done,) = [line for line in lines if line["event"] == "job succeeded"]
    assert (done["job"], done["request"], done["traceparent"]) == (
        job["id"],
        "mine",
        record.origin["traceparent"],
    )
    assert record.origin["request"] == "mine"

    finished = spans.get_finished_spans()
    (request,) = [span for span in finished if span.name == "POST /v1/merges"]
    assert request.parent is not None and request.context is not None and request.attributes is not None
    assert f"{request.parent.trace_id:032x}-{request.parent.span_id:016x}" == CALLER[3:-3]
    assert record.origin["traceparent"][36:-3] == f"{request.context.span_id:016x}"
    assert request.attributes["http.response.status_code"] == 202
    (below,) = tree(finished, request.context.span_id)["job"]
    assert set(below) == {"plan", "work", "commit"}
    made = below["work"][0]["part"]
    assert len(made) == parts
    assert all(set(stages) == STAGES for stages in made)
    ids = {span.attributes["mergemill.part"] for span in finished if span.name == "part" and span.attributes}
    assert len(ids) == parts
    assert len({span.context.trace_id for span in finished if span.name in STAGES and span.context}) == 1


def test_a_failure_names_its_part(
    small: tuple[httpx.Client, JobStore],
    recipe: dict[str, Any],
    tmp_path: Path,
    lines: list[dict[str, Any]],
    spans: InMemorySpanExporter,
) -> None:
    broken = fine_tune(llama_tensors(1), 2)
    name = "model.layers.0.mlp.down_proj.weight"
    broken[name] = broken[name].clone()
    broken[name].reshape(-1)[3] = float("nan")
    write_checkpoint(tmp_path / "b", broken)
    job = merged(small[0], recipe, tmp_path / "out")
    assert (job["state"], job["error"]["type"]) == ("failed", "NonFiniteError")
    (failed,) = [line for line in lines if line["event"] == "task failed"]
    assert len(failed["part"]) == 32
    assert failed["part"] == job["error"]["part"]
    assert (failed["job"], failed["request"]) == (job["id"], "mine")
    (span,) = [each for each in spans.get_finished_spans() if each.name == "part" and not each.status.is_ok]
    assert span.attributes is not None
    assert (span.attributes["mergemill.part"], span.attributes["error.type"]) == (
        failed["part"],
        "NonFiniteError",
    )


@pytest.mark.ray
def test_workers_log_the_ids_that_they_are_given(
    service: RunningService, driver: Driver, recipe: dict[str, Any], tmp_path: Path
) -> None:
    job = merged(service.http, recipe, tmp_path / "out")
    assert job["state"] == "succeeded", job["error"]
    wanted = set(service.parts(job["id"]))
    child = driver._child
    assert child is not None
    logs = child._log.parent / "ray"
    deadline = time.monotonic() + 20
    while True:
        found = [
            json.loads(line)
            for path in logs.glob("session_*/logs/worker-*.err")
            for line in path.read_text(errors="replace").splitlines()
            if line.startswith("{") and job["id"] in line
        ]
        if {line.get("part") for line in found if line["event"] == "part written"} == wanted:
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    assert {line["request"] for line in found} == {"mine"}
