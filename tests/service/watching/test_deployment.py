"""What is known of a whole deployment: heartbeats that end by themselves, and a queue whose age costs nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from service.cluster.driver import Capacity
from service.jobs.jobstore import JobStore
from service.jobs.record import JobState, created_at_ms, new_job, new_job_id
from service.jobs.transitions import CancelRequested
from service.settings import Settings
from service.watching.deployment import Deployment, Heartbeat, View
from service.watching.heartbeat import BEATS_PER_LIFE, Heart
from workers.errors import JobStoreUnavailableError

pytestmark = pytest.mark.valkey

BEAT = Heartbeat(owner="host:1:ab", version="1", nodes=2, cpus=8, gpus=1, jobs=3, ttl_s=30)


@dataclass
class Fleet:
    known_capacity: Capacity | None = None
    in_flight: int = 0


@pytest.fixture
def deployment(valkey_url: str, valkey_namespace: str) -> Iterator[Deployment]:
    with Deployment(valkey_url, valkey_namespace) as found:
        yield found


def owners(deployment: Deployment) -> set[str]:
    return {scheduler.beat.owner for scheduler in deployment.look().schedulers}


def until(wanted: set[str], deployment: Deployment) -> None:
    deadline = time.monotonic() + 20
    while owners(deployment) != wanted:
        assert time.monotonic() < deadline, owners(deployment)
        time.sleep(0.01)


def test_nothing_yet(deployment: Deployment) -> None:
    view = deployment.look()
    assert view == View(dict.fromkeys(JobState, 0), None, ())
    assert view.queue_age_s(time.time()) == 0
    deployment.leave("nobody")


def test_the_last_heartbeat_counts(deployment: Deployment) -> None:
    deployment.beat(BEAT)
    deployment.beat(replace(BEAT, nodes=5))
    deployment.beat(replace(BEAT, owner="other"))
    found = {scheduler.beat.owner: scheduler for scheduler in deployment.look().schedulers}
    assert found[BEAT.owner].beat == replace(BEAT, nodes=5)
    assert 0 <= found["other"].age_s < 20
    deployment.leave(BEAT.owner)
    deployment.leave(BEAT.owner)
    assert owners(deployment) == {"other"}


def test_who_falls_silent_is_gone_and_forgotten(deployment: Deployment, valkey_namespace: str) -> None:
    deployment.beat(replace(BEAT, ttl_s=0.05))
    until(set(), deployment)
    members = deployment._redis.smembers(f"{valkey_namespace}:schedulers")
    assert members == {BEAT.owner}
    deployment.beat(replace(BEAT, owner="other"))
    assert deployment._redis.smembers(f"{valkey_namespace}:schedulers") == {"other"}


def test_a_newer_version_may_say_more(deployment: Deployment, valkey_namespace: str) -> None:
    deployment.beat(BEAT)
    key = f"{valkey_namespace}:scheduler:{BEAT.owner}"
    text = str(deployment._redis.get(key)).replace("{", '{"mood": "fine", ', 1)
    deployment._redis.set(key, text, keepttl=True)
    assert owners(deployment) == {BEAT.owner}


def test_jobs_are_counted_by_state_and_the_oldest_that_is_queued_is_known(
    deployment: Deployment, job_store: JobStore
) -> None:
    ids = []
    for now in (5000.25, 4000.5, 6000.0):
        record = new_job({}, f"s3://b/{now}", {}, now)
        job_store.create(record)
        ids.append(record.id)
    view = deployment.look()
    assert view.jobs == dict.fromkeys(JobState, 0) | {JobState.QUEUED: 3}
    assert view.oldest_queued_ms == 4000500
    assert view.queue_age_s(4001.0) == 0.5
    assert view.queue_age_s(3000.0) == 0  # this machine's clock is behind the other's
    job_store.apply(ids[1], CancelRequested())
    view = deployment.look()
    assert (view.jobs[JobState.QUEUED], view.jobs[JobState.CANCELLED]) == (2, 1)
    assert view.oldest_queued_ms == 5000250


def test_an_id_tells_when_it_was_made() -> None:
    for now in (0.0, 0.001, 1_795_000_000.123, 2**47 / 1000):
        assert created_at_ms(new_job_id(now)) == int(now * 1000)


def test_no_redis_is_told_soon() -> None:
    begun = time.monotonic()
    with Deployment("redis://127.0.0.1:1") as nowhere, pytest.raises(JobStoreUnavailableError):
        nowhere.look()
    assert time.monotonic() - begun < 5


def test_a_heart_beats_and_says_goodbye(
    deployment: Deployment, valkey_url: str, valkey_namespace: str
) -> None:
    settings = Settings(redis_url=valkey_url, namespace=valkey_namespace, lease_seconds=1.5)
    fleet = Fleet()
    with Heart(settings, "me", fleet, lambda: 7) as heart:
        until({"me"}, deployment)
        (scheduler,) = deployment.look().schedulers
        assert (scheduler.beat.nodes, scheduler.beat.jobs) == (0, 7)
        for nodes in range(2, 3 + BEATS_PER_LIFE):  # each a beat, together longer than a life
            fleet.known_capacity = Capacity(cpus=4, gpus=0, nodes=nodes, max_node_memory_bytes=1)
            deadline = time.monotonic() + 20
            while [found.beat.nodes for found in deployment.look().schedulers] != [nodes]:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert owners(deployment) == set()
    assert not heart._thread.is_alive()


def test_a_heart_survives_that_redis_is_away() -> None:
    settings = Settings(redis_url="redis://127.0.0.1:1", lease_seconds=0.2)
    with Heart(settings, "me", Fleet(), lambda: 0) as heart:
        assert not heart._thread.join(timeout=0.5)
        assert heart._thread.is_alive()
