"""What Prometheus is told, all of it: a registry for each kind of process, and what is read when it is scraped.

An event is counted by the process that sees it. What all of a deployment shares, the queue and the schedulers, is
read from Redis when the API is scraped. Labels have few values, known beforehand: no id, URI or tensor's name.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Final, Protocol

import structlog
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.jobs.record import JobRecord
from service.watching.deployment import Deployment
from workers.errors import JobStoreUnavailableError
from workers.store.retries import CAUSES, RETRIES
from workers.task import PartResult

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
"""What :func:`render` returns: Prometheus' text format, which every version of it reads."""

API: Final = CollectorRegistry()
"""What an API process counts."""

SCHEDULER: Final = CollectorRegistry()
"""What a scheduler counts."""

log = structlog.get_logger(__name__)

disable_created_metrics()  # type: ignore[no-untyped-call] # a series more for each, which nobody asks for

for _registry in (API, SCHEDULER):
    ProcessCollector(registry=_registry)
    Info("mergemill_build", "Version of Mergemill and of Python.", registry=_registry).info(
        {"version": version("mergemill"), "python_version": platform.python_version()}
    )

HTTP_REQUESTS: Final = Counter(
    "mergemill_http_requests",
    "HTTP requests that were answered, by the template of their route.",
    ("method", "route", "status"),
    registry=API,
)
HTTP_SECONDS: Final = Histogram(
    "mergemill_http_request_duration_seconds",
    "Time until an answer began, by the template of its route.",
    ("method", "route"),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=API,
)

JOB_SECONDS: Final = Histogram(
    "mergemill_job_duration_seconds",
    "Time from a job's submission to its end, by the state that it ended in.",
    ("state",),
    buckets=(1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 24 * 3600),
    registry=SCHEDULER,
)
JOB_RETRIES: Final = Counter(
    "mergemill_job_retries",
    "How often a job went on from what is recorded (store) or started over (upload, plan), by cause.",
    ("cause",),
    registry=SCHEDULER,
)
LEASE_LOSSES: Final = Counter(
    "mergemill_lease_losses", "Leases that ran out while their job was worked on.", registry=SCHEDULER
)
PARTS: Final = Counter("mergemill_parts_done", "Parts that were made and uploaded.", registry=SCHEDULER)
SURVEY_TASKS: Final = Counter(
    "mergemill_survey_tasks_done", "Survey tasks that finished.", registry=SCHEDULER
)
READ_BYTES: Final = Counter(
    "mergemill_read_bytes",
    "Input bytes that finished tasks fetched, by kind of task.",
    ("task",),
    registry=SCHEDULER,
)
WRITTEN_BYTES: Final = Counter(
    "mergemill_written_bytes", "Output bytes of the parts that were made.", registry=SCHEDULER
)
STAGE_SECONDS: Final = Histogram(
    "mergemill_part_stage_duration_seconds",
    "Time that a part spent in a stage, waiting not counted.",
    ("stage",),
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
    registry=SCHEDULER,
)
PEAK_RATIO: Final = Histogram(
    "mergemill_worker_peak_memory_ratio",
    "Peak memory of a worker when a part was done, over the job's priced peak.",
    buckets=(0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2),
    registry=SCHEDULER,
)
PEAK_BYTES: Final = Histogram(
    "mergemill_worker_peak_memory_bytes",
    "Peak memory of a worker when a part was done.",
    buckets=tuple(float(1 << power) for power in range(28, 38)),
    registry=SCHEDULER,
)
TASK_RETRIES: Final = Counter(
    "mergemill_task_retries",
    "Tasks that were handed out again, by what ended them.",
    ("cause",),
    registry=SCHEDULER,
)
STORE_RETRIES: Final = Counter(
    "mergemill_store_retries",
    "Requests to the store that workers and schedulers sent again, by cause.",
    ("cause",),
    registry=SCHEDULER,
)
FLEET_RESTARTS: Final = Counter(
    "mergemill_fleet_restarts",
    "How often the process that talks to Ray was started again.",
    registry=SCHEDULER,
)

SWEPT: Final = Counter(
    "mergemill_swept",
    "What was cleared away after jobs had ended: records, and what had been left at outputs.",
    ("what",),
    registry=SCHEDULER,
)

STAGES: Final = ("read", "merge", "digest", "write")
"""Stages of a part."""

TASK_RETRY_CAUSES: Final = {
    "OutOfMemoryError": "out_of_memory",
    "WorkerCrashedError": "worker_died",
    "NodeDiedError": "node_died",
    "OwnerDiedError": "node_died",
}
"""Ray's names for what ends a task, and ours."""

OTHER: Final = "other"
"""The label's value for what is on no list."""

FLEET_DIED: Final = "fleet_died"
"""The cause of a retry when all of Ray's driver went."""

JOB_RETRY_CAUSES: Final = ("store", "upload", "plan")
"""Why a job goes on anew: the store was out of reach, an upload is gone, planning gave another plan."""

# A series that is not there before its first event has no rate at that event.
for _cause in (*dict.fromkeys(TASK_RETRY_CAUSES.values()), FLEET_DIED, OTHER):
    TASK_RETRIES.labels(_cause)
for _cause in JOB_RETRY_CAUSES:
    JOB_RETRIES.labels(_cause)
for _cause in CAUSES:
    STORE_RETRIES.labels(_cause)
for _what in ("record", "output"):
    SWEPT.labels(_what)
for _stage in STAGES:
    STAGE_SECONDS.labels(_stage)
for _state in ("succeeded", "failed", "cancelled"):
    JOB_SECONDS.labels(_state)
for _task in ("part", "survey"):
    READ_BYTES.labels(_task)


def part_done(result: PartResult, priced_peak_bytes: int) -> None:
    """Count a part that a worker has made."""
    PARTS.inc()
    READ_BYTES.labels("part").inc(result.bytes_read)
    WRITTEN_BYTES.inc(result.size)
    PEAK_BYTES.observe(result.peak_bytes)
    if priced_peak_bytes:
        PEAK_RATIO.observe(result.peak_bytes / priced_peak_bytes)
    _store_retried(result.retries)
    for stage in STAGES:
        if stage in result.seconds:
            STAGE_SECONDS.labels(stage).observe(result.seconds[stage])


def job_ended(record: JobRecord) -> None:
    """Count a job that has come to its end, and what this process has sent to the store again until now."""
    _store_retried(RETRIES.take())
    JOB_SECONDS.labels(str(record.state)).observe(record.updated_at - record.created_at)


def task_retried(cause: str) -> None:
    """Count a task that goes out again; ``cause`` begins with the name of Ray's error."""
    TASK_RETRIES.labels(TASK_RETRY_CAUSES.get(cause.partition(":")[0], OTHER)).inc()


def _store_retried(counts: Mapping[str, int]) -> None:
    for cause, count in counts.items():
        STORE_RETRIES.labels(cause if cause in CAUSES else OTHER).inc(count)


class Capacity(Protocol):
    """What a compute cluster offers."""

    @property
    def cpus(self) -> float:
        """CPU cores."""
        ...

    @property
    def gpus(self) -> float:
        """GPUs."""
        ...

    @property
    def nodes(self) -> int:
        """Nodes."""
        ...


class Fleet(Protocol):
    """A handle on a compute cluster."""

    @property
    def known_capacity(self) -> Capacity | None:
        """What it offers, if it is up."""
        ...

    @property
    def in_flight(self) -> int:
        """Tasks that it has."""
        ...


class FleetCollector(Collector):
    """A scheduler's compute cluster, as it is when it is scraped."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Gauges; all are 0 while the cluster is not up."""
        capacity = self._fleet.known_capacity
        yield _gauge("fleet_nodes", "Nodes of the compute cluster.", capacity.nodes if capacity else 0)
        yield _gauge("fleet_cpus", "CPU cores of the compute cluster.", capacity.cpus if capacity else 0)
        yield _gauge("fleet_gpus", "GPUs of the compute cluster.", capacity.gpus if capacity else 0)
        yield _gauge(
            "fleet_tasks_in_flight", "Tasks that the cluster runs, or is about to.", self._fleet.in_flight
        )


class DeploymentCollector(Collector):
    """What all of a deployment shares, read from Redis when it is scraped; the same from every API process."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment

    def collect(self) -> Iterator[Metric]:
        """Gauges; only the first of them while Redis is out of reach."""
        try:
            view = self._deployment.look()
        except JobStoreUnavailableError as error:
            log.warning("job state is out of reach; it is not in the metrics", error=str(error))
            yield _gauge("job_store_up", "Whether Redis answered.", 0)
            return
        yield _gauge("job_store_up", "Whether Redis answered.", 1)
        jobs = GaugeMetricFamily("mergemill_jobs", "Jobs by state.", labels=("state",))
        for state, count in view.jobs.items():
            jobs.add_metric((str(state),), count)
        yield jobs
        yield _gauge(
            "queue_age_seconds",
            "How long the oldest queued job has waited; 0 when none does.",
            view.queue_age_s(time.time()),
        )
        yield _gauge("schedulers", "Schedulers that are alive.", len(view.schedulers))


def render(*collectors: Collector) -> bytes:
    """What these collectors have, in the format of :data:`CONTENT_TYPE`."""
    return generate_latest(_All(collectors))


class _All(Collector):
    def __init__(self, collectors: tuple[Collector, ...]) -> None:
        self._collectors = collectors

    def collect(self) -> Iterator[Metric]:
        for collector in self._collectors:
            yield from collector.collect()


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"mergemill_{name}", help_text, value=value)
