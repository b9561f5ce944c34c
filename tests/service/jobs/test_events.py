"""What is told of a job: each change once, in its own step, and never what did not happen."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from service.jobs import jobstore
from service.jobs.events import CHANGES, JobEvent, last_event, read_event, read_id, telling
from service.jobs.jobstore import JobStore
from service.jobs.record import JobState
from service.jobs.transitions import (
    CancelRequested,
    CommitStarted,
    PlanningStarted,
    Restarted,
    advance,
)
from service.valkey import EmbeddedValkey
from tests.servers.redis_proxy import AnswerLosingProxy
from tests.service.held_jobs import claimed, lose
from tests.service.job_steps import PATHS, TO_RUNNING, fresh, part
from workers.errors import IllegalTransitionError, LeaseLostError, MalformedRequestError


def told(store: JobStore, raw: redis.Redis, job: str) -> list[JobEvent]:
    """The job's stream."""
    rows: Any = raw.xrange(f"{store._namespace}:job:{job}:events")
    return [read_event(job, *row) for row in rows]


def names(store: JobStore, raw: redis.Redis, job: str) -> list[str]:
    return [event.event for event in told(store, raw, job)]


@pytest.mark.fast
class TestPure:
    @pytest.mark.parametrize("state", [*JobState])
    def test_an_event_that_ends_a_job_is_named_for_how(self, state: JobState) -> None:
        record = fresh()
        for event in PATHS[state]:
            before, record = record, advance(record, event, 2000.0)
            name = telling(before, record)[0]
            assert name in CHANGES
            assert (name == record.state) is record.state.is_terminal
        assert telling(record, record)[0] == ""
        assert telling(None, record)[2] == f"{record.bytes_total} {record.parts_total} {record.surveys_total}"

    @pytest.mark.parametrize(
        "text", ["", "1", "1-", "-1", "1-0-0", "$", "1-0\n", "18446744073709551616-0", "x-y"]
    )
    def test_what_is_no_id(self, text: str) -> None:
        with pytest.raises(MalformedRequestError):
            read_id(text)

    def test_what_is_one(self) -> None:
        assert read_id("18446744073709551615-0") == "18446744073709551615-0"


@pytest.mark.valkey
class TestChanges:
    @pytest.mark.parametrize("state", [*JobState])
    def test_the_stream_is_the_history(self, job_store: JobStore, raw: redis.Redis, state: JobState) -> None:
        record, _ = claimed(job_store, *PATHS[state])
        events = told(job_store, raw, record.id)
        assert [event.at for event in events] == [entry.at for entry in record.history]
        assert [event.detail for event in events] == [entry.detail for entry in record.history]
        assert [event.version for event in events] == list(range(1, record.version + 1))
        assert [event.state for event in events] == [entry.state for entry in record.history]
        assert [event.event for event in events[:-1]] == [entry.event for entry in record.history[:-1]]
        assert events[-1].event == (state if state.is_terminal else record.history[-1].event)
        if state not in {JobState.QUEUED, JobState.CANCELLED, JobState.FAILED}:
            assert (events[-1].progress.bytes_total, events[-1].progress.parts_total) == (3000, 3)
            assert events[-1].progress.surveys_total == 2
        stood = last_event(job_store.status(record.id))
        assert stood.to_json() == events[-1].to_json()

    def test_what_changes_nothing_is_not_told(self, job_store: JobStore, raw: redis.Redis) -> None:
        record, lease = claimed(job_store, *TO_RUNNING)
        job_store.apply(record.id, CancelRequested())
        before = names(job_store, raw, record.id)
        job_store.apply(record.id, CancelRequested())
        with pytest.raises(IllegalTransitionError):
            job_store.apply(record.id, CommitStarted(), lease.token)
        lose(job_store, lease)
        with pytest.raises(LeaseLostError):
            job_store.apply(record.id, Restarted("x"), lease.token)
        with pytest.raises(LeaseLostError):
            job_store.warn(lease, "x")
        with pytest.raises(LeaseLostError):
            job_store.record_part(lease, part(1))
        assert names(job_store, raw, record.id) == before
        assert before[-1] == "cancel_requested"

    def test_the_feed_names_the_jobs(self, job_store: JobStore, raw: redis.Redis) -> None:
        first, second = claimed(job_store)[0], claimed(job_store, PlanningStarted())[0]
        rows: Any = raw.xrange(f"{job_store._namespace}:events")
        assert [fields["job"] for _, fields in rows] == [first.id, second.id, second.id]


@pytest.mark.valkey
class TestProgress:
    def test_it_is_told_about_once_a_second(self, job_store: JobStore, raw: redis.Redis) -> None:
        record, lease = claimed(job_store, *TO_RUNNING)
        begun = time.monotonic()
        for number in range(200):
            job_store.record_part(lease, part(number))
        seconds = time.monotonic() - begun
        events = [event for event in told(job_store, raw, record.id) if event.event == "progress"]
        assert 1 <= len(events) <= 1 + seconds
        assert events[0].progress.bytes_done == 1000
        assert (events[0].version, events[0].state, events[0].detail) == (4, "running", "")
        assert abs(events[0].at - time.time()) < 60

    def test_the_next_event_tells_the_rest(self, job_store: JobStore, raw: redis.Redis) -> None:
        record, lease = claimed(job_store, *TO_RUNNING)
        for number in (1, 2, 3, 3):
            job_store.record_part(lease, part(number))
        job_store.record_survey(lease, "s", 0, {}, 7)
        job_store.apply(record.id, CommitStarted(), lease.token)
        last = told(job_store, raw, record.id)[-1]
        assert (last.event, last.progress.parts_done, last.progress.bytes_done) == ("commit_started", 3, 3000)
        assert (last.progress.surveys_done, last.progress.bytes_read) == (1, 9007)

    def test_after_a_second_it_is_told_again(self, job_store: JobStore, raw: redis.Redis) -> None:
        record, lease = claimed(job_store, *TO_RUNNING)
        job_store.record_part(lease, part(1))
        progress = f"{job_store._namespace}:job:{record.id}:progress"
        raw.hincrby(progress, "told_at", -1000)
        job_store.record_part(lease, part(2))
        raw.hincrby(progress, "told_at", 10**9)  # the clock was set back
        job_store.record_part(lease, part(3))
        told_bytes = [e.progress.bytes_done for e in told(job_store, raw, record.id) if e.event == "progress"]
        assert told_bytes == [1000, 2000, 3000]

    def test_starting_over_starts_at_nothing(self, job_store: JobStore, raw: redis.Redis) -> None:
        record, lease = claimed(job_store, *TO_RUNNING)
        job_store.record_part(lease, part(1))
        job_store.apply(record.id, Restarted("another plan"), lease.token)
        last = told(job_store, raw, record.id)[-1]
        assert (last.event, last.detail, last.state) == ("restarted", "another plan", "planning")
        assert (last.progress.bytes_done, last.progress.bytes_total) == (0, 0)

    def test_a_stream_has_a_bound(
        self, job_store: JobStore, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        record, lease = claimed(job_store, *TO_RUNNING)
        key = f"{job_store._namespace}:job:{record.id}:events"
        ((_, entry),) = raw.xrange(key, count=1)
        with raw.pipeline() as pipe:
            for _ in range(3000):
                pipe.xadd(key, entry)
            pipe.execute()
        job_store.warn(lease, "one more")
        assert 2000 <= raw.xlen(key) <= 2200
        assert names(job_store, raw, record.id)[-1] == "warning"


@pytest.mark.valkey
class TestLostAnswers:
    @pytest.fixture
    def losing(
        self, valkey_server: EmbeddedValkey, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[tuple[JobStore, AnswerLosingProxy]]:
        proxy = AnswerLosingProxy("127.0.0.1", valkey_server.port)
        url = valkey_server.url.replace(f":{valkey_server.port}", f":{proxy.port}")
        with JobStore(url, f"test-{uuid.uuid4().hex}") as store:
            yield store, proxy
        proxy.close()

    def test_what_happened_once_is_told_once(
        self, losing: tuple[JobStore, AnswerLosingProxy], raw: redis.Redis
    ) -> None:
        store, proxy = losing
        record = fresh(time.time())
        proxy.lose = 2
        store.create(record)
        lease = store.acquire(record.id, "owner", 60)
        assert lease is not None
        for event in TO_RUNNING:
            proxy.lose = 2
            store.apply(record.id, event, lease.token)
        proxy.lose = 2
        store.warn(lease, "w")
        proxy.lose = 2
        store.record_part(lease, part(1))
        assert proxy.lost == 12
        expected = ["created", "planning_started", "planned", "uploads_opened", "warning", "progress"]
        assert names(store, raw, record.id) == expected

    def test_a_warning_is_short(self, job_store: JobStore, raw: redis.Redis) -> None:
        record, lease = claimed(job_store, PlanningStarted())
        job_store.warn(lease, "é" * 10_000)
        last = told(job_store, raw, record.id)[-1]
        assert (last.event, last.detail, last.version) == ("warning", "é" * 500, 2)
        assert raw.llen(f"{job_store._namespace}:job:{record.id}:writes") <= jobstore.REMEMBERED_WRITES
