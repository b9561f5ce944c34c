"""Jobs that have ended: who sweeps, what is forgotten, and what is not."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
import redis

from service.jobs.idempotency import once
from service.jobs.jobstore import JobStore
from service.jobs.record import JobState
from service.jobs.sweepstore import SweepStore
from service.jobs.transitions import Cancelled, CancelRequested, Event, Failed, PlanningStarted
from service.webhooks.store import WebhookStore
from service.webhooks.webhooks import Webhook
from tests.service.held_jobs import claimed
from tests.service.job_steps import ERROR, PATHS, TO_RUNNING, fresh, part
from workers.errors import ConflictError, IllegalTransitionError, JobNotFoundError

pytestmark = pytest.mark.valkey

LATER = 60.0
"""A time after all of a test, from now, in seconds."""


@pytest.fixture
def sweeps(valkey_url: str, valkey_namespace: str) -> Iterator[SweepStore]:
    with SweepStore(valkey_url, valkey_namespace) as store:
        yield store


def over(store: JobStore, *events: Event, key: str | None = None) -> str:
    """A job that the events have brought to its end, with nobody at it."""
    record = fresh(time.time()).model_copy(update={"key": key})
    store.create(record)
    lease = store.acquire(record.id, "owner", 60)
    assert lease is not None
    for event in events:
        store.apply(record.id, event, None if isinstance(event, CancelRequested) else lease.token)
    store.release(lease)
    return record.id


def test_one_sweeps_at_a_time(sweeps: SweepStore) -> None:
    assert sweeps.lead("one", 60)
    assert not sweeps.lead("two", 60)
    assert sweeps.lead("one", 60)
    sweeps.retire("two")
    assert not sweeps.lead("two", 60)
    sweeps.retire("one")
    assert sweeps.lead("two", 0.02)
    deadline = time.monotonic() + 10
    while not sweeps.lead("one", 60):
        assert time.monotonic() < deadline, "who died sweeps for ever"


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_nothing_is_left_of_a_job_that_is_forgotten(
    job_store: JobStore, sweeps: SweepStore, raw: redis.Redis, valkey_url: str, state: JobState
) -> None:
    namespace = job_store._namespace
    asked = once("key", "POST", "/", [], {}, 60)
    record = fresh(time.time()).model_copy(update={"key": "0" * 12})
    hook = Webhook(url="https://example.com/", events=("succeeded", "failed", "cancelled"), secret="")
    job_store.create(record, asked, hook)
    lease = job_store.acquire(record.id, "owner", 60)
    assert lease is not None
    with WebhookStore(valkey_url, namespace) as webhooks:
        for event in PATHS[state]:
            job_store.apply(record.id, event, None if isinstance(event, CancelRequested) else lease.token)
            if event == TO_RUNNING[-1]:
                job_store.record_part(lease, part(1))
                job_store.record_survey(lease, "s", 0, {}, 1)
                job_store.claim_output(lease, record.output)
        job_store.release(lease)
        assert webhooks.deliveries(record.id).deliveries
        assert sweeps.ended(sweeps.now() + LATER) == (record.id,)
        sweeps.forget(record.id)
        assert webhooks.claim(60) is None
    with pytest.raises(JobNotFoundError):
        job_store.get(record.id)
    keys = {str(key).removeprefix(f"{namespace}:") for key in raw.keys(f"{namespace}:*")}
    kept = {"events", "leases", "queues", asked_key(asked)}
    assert {key for key in keys if not key.startswith("forgotten:")} == kept
    again = fresh(time.time())
    assert job_store.create(again, asked) == again.id, "an idempotency key of a job that is gone"


def asked_key(asked: object) -> str:
    return f"once:{asked.key}"  # type: ignore[attr-defined]


def test_what_goes_on_is_never_forgotten(job_store: JobStore, sweeps: SweepStore) -> None:
    for events in (PATHS[JobState.QUEUED], TO_RUNNING, PATHS[JobState.COMMITTING]):
        record, lease = claimed(job_store, *events)
        job_store.release(lease)
        before = job_store.get(record.id)
        assert not sweeps.forget_old(record.id, sweeps.now() + LATER)
        with pytest.raises(IllegalTransitionError, match="cancel it"):
            sweeps.forget(record.id)
        assert job_store.get(record.id) == before
    assert sweeps.ended(sweeps.now() + LATER) == sweeps.unswept(sweeps.now() + LATER) == ()


def test_what_is_too_young_is_not_forgotten(job_store: JobStore, sweeps: SweepStore) -> None:
    began = sweeps.now()
    job = over(job_store, Failed(ERROR))
    assert sweeps.ended(began) == ()
    assert not sweeps.forget_old(job, began)  # whatever made the caller believe otherwise
    assert sweeps.ended(sweeps.now() + LATER) == (job,)
    assert sweeps.forget_old(job, sweeps.now() + LATER)
    assert not sweeps.forget_old(job, sweeps.now() + LATER)


def test_a_job_that_is_being_worked_at_is_not_forgotten(job_store: JobStore, sweeps: SweepStore) -> None:
    job = over(job_store, Failed(ERROR))
    lease = job_store.acquire(job, "a sweeper", 60)
    assert lease is not None
    with pytest.raises(ConflictError):
        sweeps.forget(job)
    assert not sweeps.forget_old(job, sweeps.now() + LATER)
    job_store.release(lease)
    sweeps.forget(job)
    with pytest.raises(JobNotFoundError):
        sweeps.forget(job)


def test_a_job_that_left_something_is_swept_at_once_and_kept_until_then(
    job_store: JobStore, sweeps: SweepStore
) -> None:
    tidy = over(job_store, PlanningStarted(), CancelRequested(), Cancelled())
    left = over(job_store, PlanningStarted(), CancelRequested(), Cancelled(left="it stalls"))
    assert sweeps.unswept(0.001) == (left,)
    assert sweeps.unswept(sweeps.now() + LATER) == (left, tidy)
    assert (sweeps.left(left), sweeps.left(tidy)) == (True, False)
    with pytest.raises(ConflictError, match="still being cleared away"):
        sweeps.forget(left)
    now = sweeps.now()
    sweeps.postpone(left, now + 1)
    assert sweeps.unswept(now) == (tidy,)
    assert sweeps.unswept(now + 2) == (tidy, left)
    sweeps.swept(left)
    assert sweeps.unswept(now + LATER) == (tidy,)
    sweeps.forget(left)
    sweeps.postpone(left, 0)  # too late
    assert sweeps.unswept(now + LATER) == (tidy,)


def test_jobs_that_ended_under_an_older_version_are_listed(
    job_store: JobStore, sweeps: SweepStore, raw: redis.Redis
) -> None:
    jobs = [over(job_store, Failed(ERROR)) for _ in range(3)]
    raw.delete(f"{job_store._namespace}:ended")
    sweeps.enrol()
    assert sweeps.ended(sweeps.now() + LATER) == tuple(jobs)
    ended_at = raw.zscore(f"{job_store._namespace}:ended", jobs[0])
    assert ended_at == pytest.approx(job_store.get(jobs[0]).updated_at * 1000)


def test_an_answer_that_is_lost_is_given_again(
    job_store: JobStore, sweeps: SweepStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = over(job_store, Failed(ERROR))
    run = SweepStore._run
    monkeypatch.setattr(
        SweepStore, "_run", lambda self, *args: (run(self, *args), run(self, *args))[1]
    )  # as after a connection that broke
    sweeps.forget(job)
    assert json.dumps(sweeps.ended(sweeps.now() + LATER)) == "[]"
