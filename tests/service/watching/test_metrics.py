"""Metrics: their names and labels, what an event does to them, and who may read them over HTTP."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Histogram
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from service.cluster.driver import Capacity
from service.watching import metrics
from service.watching.metrics_server import MetricsServer, may_read
from tests.service.job_steps import fresh
from tests.service.metric_names import Fleet, every_metric
from workers.store.retries import RETRIES
from workers.task import PartResult

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[3]
BOUNDED = {
    "what",
    "method",
    "route",
    "status",
    "state",
    "stage",
    "task",
    "cause",
    "version",
    "python_version",
    "le",
}
"""Every label there may be: each has few values."""


def sample(name: str, **labels: str) -> float:
    """A scheduler's value now."""
    found = metrics.SCHEDULER.get_sample_value(name, labels)
    assert found is not None, name
    return found


def families(*collectors: Collector) -> dict[str, dict[tuple[str, ...], float]]:
    """Sample name to label values to value, as Prometheus would parse them."""
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.render(*collectors).decode()):
        for each in family.samples:
            found.setdefault(each.name, {})[tuple(each.labels.values())] = each.value
    return found


def test_names_and_labels_follow_the_rules() -> None:
    for name, (kind, labels) in every_metric().items():
        assert re.fullmatch(r"mergemill(_[a-z]+)+", name), name
        assert labels <= BOUNDED, name
        if kind == "histogram":
            assert re.search(r"_(seconds|ratio|bytes)$", name), name
        assert not re.search(r"_(total|count|sum|bucket|created|ms|kb|mb)$", name), name


def test_the_guide_lists_every_metric() -> None:
    guide = (ROOT / "docs/operations.md").read_text()
    rows = dict(re.findall(r"^\| `(mergemill_[a-z_]+)` \| ([a-z]+)[^|]* \|", guide, re.MULTILINE))
    shown = {
        f"{name}_total" if kind == "counter" else name: kind for name, (kind, _) in every_metric().items()
    }
    assert rows == shown


def result(**changes: object) -> PartResult:
    values = {
        "part": "p", "shard": "s", "number": 1, "size": 1000, "etag": "e", "digests": (), "bytes_read": 3000,
        "nonfinite": {}, "peak_bytes": 770, "seconds": {"read": 0.3, "merge": 0.02, "write": 7.0},
    }  # fmt: skip
    return PartResult(**{**values, **changes})  # type: ignore[arg-type]


def test_a_part_is_counted_by_what_it_did() -> None:
    names = [
        ("mergemill_parts_done_total", {}, 1),
        ("mergemill_read_bytes_total", {"task": "part"}, 3000),
        ("mergemill_read_bytes_total", {"task": "survey"}, 0),
        ("mergemill_written_bytes_total", {}, 1000),
        ("mergemill_part_stage_duration_seconds_sum", {"stage": "read"}, 0.3),
        ("mergemill_part_stage_duration_seconds_sum", {"stage": "write"}, 7.0),
        ("mergemill_part_stage_duration_seconds_count", {"stage": "digest"}, 0),
        ("mergemill_part_stage_duration_seconds_bucket", {"stage": "write", "le": "5.0"}, 0),
        ("mergemill_part_stage_duration_seconds_bucket", {"stage": "write", "le": "10.0"}, 1),
        ("mergemill_worker_peak_memory_ratio_bucket", {"le": "0.7"}, 0),
        ("mergemill_worker_peak_memory_ratio_bucket", {"le": "0.8"}, 1),
        ("mergemill_worker_peak_memory_bytes_sum", {}, result().peak_bytes),
        ("mergemill_store_retries_total", {"cause": "throttled"}, 3),
        ("mergemill_store_retries_total", {"cause": "timeout"}, 0),
    ]
    before = [sample(name, **labels) for name, labels, _ in names]
    metrics.part_done(result(retries={"throttled": 3}), 1000)
    after = [sample(name, **labels) for name, labels, _ in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([n for *_, n in names])


def test_a_price_of_nothing_is_no_ratio() -> None:
    before = sample("mergemill_worker_peak_memory_ratio_count")
    metrics.part_done(result(), 0)
    assert sample("mergemill_worker_peak_memory_ratio_count") == before


@pytest.mark.parametrize(
    ("cause", "label"),
    [
        ("OutOfMemoryError: Task was killed", "out_of_memory"),
        ("WorkerCrashedError: The worker died", "worker_died"),
        ("NodeDiedError: gone", "node_died"),
        ("s3://bucket/anything at all", "other"),
        ("", "other"),
    ],
)
def test_retries_are_counted_by_a_cause_that_is_on_a_list(cause: str, label: str) -> None:
    before = sample("mergemill_task_retries_total", cause=label)
    metrics.task_retried(cause)
    assert sample("mergemill_task_retries_total", cause=label) == before + 1


def test_a_job_is_counted_by_how_it_ended_and_how_long_it_took() -> None:
    job = fresh(1000.0).model_copy(update={"state": "failed", "updated_at": 1100.0})
    RETRIES.take()
    RETRIES.add("checksum")  # as when the index is put
    names = [
        ("mergemill_job_duration_seconds_sum", {"state": "failed"}),
        ("mergemill_store_retries_total", {"cause": "checksum"}),
    ]
    before = [sample(name, **labels) for name, labels in names]
    metrics.job_ended(job)
    after = [sample(name, **labels) for name, labels in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == pytest.approx([100, 1])


def test_a_fleet_that_is_not_up_offers_nothing() -> None:
    down = families(metrics.FleetCollector(Fleet()))
    assert {name: value for name, values in down.items() for value in values.values()} == dict.fromkeys(
        [f"mergemill_fleet_{name}" for name in ("nodes", "cpus", "gpus", "tasks_in_flight")], 0.0
    )
    up = families(metrics.FleetCollector(Fleet(Capacity(8, 2, 3, 1 << 30), 5)))
    assert [next(iter(values.values())) for values in up.values()] == [3.0, 8.0, 2.0, 5.0]


def test_a_series_is_there_before_its_first_event() -> None:
    shown = families(metrics.SCHEDULER)
    assert set(shown["mergemill_job_retries_total"]) == {("store",), ("upload",), ("plan",)}
    assert ("failed",) in shown["mergemill_job_duration_seconds_count"]
    assert len(shown["mergemill_task_retries_total"]) == 5
    for histogram in (
        metrics.STAGE_SECONDS,
        metrics.HTTP_SECONDS,
        metrics.JOB_SECONDS,
        metrics.PEAK_RATIO,
        metrics.PEAK_BYTES,
    ):
        assert isinstance(histogram, Histogram)
        assert list(histogram._upper_bounds) == sorted(histogram._upper_bounds)
        assert math.isinf(histogram._upper_bounds[-1])


# Who may read


def asked(headers: Mapping[str, str], peer: str | None = "127.0.0.1", token: str | None = None) -> bool:
    return may_read(peer, httpx.Headers(headers).get, token)


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::1%lo"])
def test_this_machine_may(peer: str) -> None:
    assert asked({}, peer)


@pytest.mark.parametrize(
    "peer", ["10.0.0.1", "::ffff:10.0.0.1", "2001:db8::1", "192.0.2.1", "", "/run/socket", None]
)
def test_others_may_not(peer: str | None) -> None:
    assert not asked({}, peer)
    assert not asked({"Authorization": "Bearer "}, peer)
    assert asked({"Authorization": "Bearer secret"}, peer, "secret")
    assert asked({"authorization": "bearer  secret "}, peer, "secret")


@pytest.mark.parametrize("name", ["Forwarded", "x-forwarded-for", "X-Real-IP", "Via"])
def test_a_proxy_on_this_machine_asks_for_somebody_else(name: str) -> None:
    assert not asked({name: "127.0.0.1"})
    assert asked({name: "127.0.0.1", "Authorization": "Bearer secret"}, token="secret")


@given(st.text(max_size=20))
def test_only_the_token_opens(given_token: str) -> None:
    found = may_read("127.0.0.1", {"Authorization": f"Bearer {given_token}"}.get, "sécret")
    assert found == (given_token.strip() == "sécret")


@pytest.fixture
def served() -> Iterator[str]:
    with MetricsServer("127.0.0.1", 0, None, metrics.SCHEDULER, metrics.FleetCollector(Fleet())) as server:
        yield f"http://127.0.0.1:{server.port}"


def test_a_scheduler_shows_its_metrics(served: str) -> None:
    answer = httpx.get(f"{served}/metrics")
    assert answer.headers["content-type"] == metrics.CONTENT_TYPE
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert {
        "mergemill_parts_done",
        "mergemill_fleet_nodes",
        "mergemill_build_info",
        "process_cpu_seconds",
    } <= names
    assert httpx.head(f"{served}/metrics").content == b""
    assert httpx.get(f"{served}/metrics?name[]=x").status_code == 200
    assert httpx.get(served).status_code == 404
    assert httpx.post(f"{served}/metrics").status_code == 501
    assert httpx.get(f"{served}/metrics", headers={"Forwarded": "for=10.0.0.1"}).status_code == 403


def test_a_token_is_asked_of_everybody() -> None:
    with MetricsServer("127.0.0.1", 0, "secret", metrics.SCHEDULER) as server:
        url = f"http://127.0.0.1:{server.port}/metrics"
        assert httpx.get(url).status_code == 403
        assert httpx.get(url, headers={"Authorization": "Bearer other"}).status_code == 403
        assert httpx.get(url, headers={"Authorization": "Bearer secret"}).status_code == 200


def test_an_address_that_is_taken_costs_the_metrics_alone() -> None:
    with (
        MetricsServer("127.0.0.1", 0, None, metrics.SCHEDULER) as first,
        MetricsServer("127.0.0.1", first.port or 0, None, metrics.SCHEDULER) as second,
    ):
        assert second.port is None
        assert httpx.get(f"http://127.0.0.1:{first.port}/metrics").status_code == 200
