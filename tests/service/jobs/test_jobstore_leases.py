"""Leases of the job store: who gets a job, for how long, and what nobody can do without."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis

from service.jobs.jobstore import JobStore, Lease
from service.jobs.record import JobState
from service.jobs.transitions import Cancelled, CancelRequested, CommitStarted, Failed
from tests.service.held_jobs import claimed, lose
from tests.service.job_steps import ERROR, PATHS, TO_RUNNING, fresh, part
from workers.errors import LeaseLostError

pytestmark = pytest.mark.valkey


def test_the_oldest_free_unfinished_job_is_next(job_store: JobStore) -> None:
    records = [fresh(1000.0 + n) for n in range(4)]
    for record in reversed(records):
        job_store.create(record)
    job_store.apply(records[0].id, CancelRequested())
    held = job_store.acquire(records[1].id, "other", 60)
    assert held is not None
    found = job_store.claim_next("me", 60)
    assert found is not None
    assert found[0] == records[2]
    assert (found[1].job, found[1].owner, found[1].ttl_s) == (records[2].id, "me", 60)
    job_store.release(held)
    assert [job_store.claim_next("me", 60) is not None for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("state", JobState)
def test_jobs_in_every_unfinished_state_can_be_claimed(job_store: JobStore, state: JobState) -> None:
    record, lease = claimed(job_store, *PATHS[state])
    job_store.release(lease)
    found = job_store.claim_next("me", 60)
    assert (None if found is None else found[0]) == (None if state.is_terminal else record)


def test_a_lease_has_one_holder_until_it_is_released(job_store: JobStore) -> None:
    record, lease = claimed(job_store)
    assert job_store.status(record.id).owner == "owner"
    assert job_store.acquire(record.id, "other", 60) is None
    job_store.release(lease)
    assert job_store.status(record.id).owner is None
    other = job_store.acquire(record.id, "other", 60)
    assert other is not None
    job_store.release(lease)  # not ours any more
    assert job_store.status(record.id).owner == "other"


def test_a_lease_expires_and_a_renewed_one_lasts(job_store: JobStore, raw: redis.Redis) -> None:
    _, kept = claimed(job_store, ttl_s=60)
    record, lease = claimed(job_store, ttl_s=0.05)
    key = f"{job_store._namespace}:job:{kept.job}:lease"
    raw.pexpire(key, 1000)
    job_store.renew(kept)
    assert 50_000 < int(raw.pttl(key)) <= 60_000
    deadline = time.monotonic() + 10
    while job_store.acquire(record.id, "other", 60) is None:
        assert time.monotonic() < deadline
    with pytest.raises(LeaseLostError):
        job_store.renew(lease)


def test_tokens_differ_even_when_redis_forgets(job_store: JobStore, raw: redis.Redis) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    epoch, _, counter = lease.token.partition(":")
    assert len(epoch) == 16
    raw.delete(f"{job_store._namespace}:leases", f"{job_store._namespace}:job:{record.id}:lease")
    again = job_store.acquire(record.id, "other", 60)
    assert again is not None
    assert again.token.partition(":")[2] == counter == "1"
    assert again.token != lease.token
    with pytest.raises(LeaseLostError):
        job_store.renew(lease)


FENCED: dict[str, Callable[[JobStore, Lease], object]] = {
    "apply": lambda store, lease: store.apply(lease.job, CommitStarted(), lease.token),
    "an illegal event": lambda store, lease: store.apply(lease.job, Cancelled(), lease.token),
    "cancel": lambda store, lease: store.apply(lease.job, CancelRequested(), lease.token),
    "renew": lambda store, lease: store.renew(lease),
    "record_part": lambda store, lease: store.record_part(lease, part(2)),
    "record_survey": lambda store, lease: store.record_survey(lease, "s", 0, {}, 1),
    "claim_output": lambda store, lease: store.claim_output(lease, "file:///b"),
    "release_output": lambda store, lease: store.release_output(lease, "file:///a"),
}
"""Everything that can be done with a lease, but to release it."""


@pytest.mark.parametrize("held_by", ["usurper", None])
@pytest.mark.parametrize("act", FENCED)
def test_a_lost_lease_can_do_nothing(
    job_store: JobStore, raw: redis.Redis, act: str, held_by: str | None
) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    job_store.record_part(lease, part(1))
    job_store.claim_output(lease, "file:///a")
    other = lose(job_store, lease)
    if held_by is None:
        job_store.release(other)
    before = {key: raw.dump(key) for key in raw.keys(f"{job_store._namespace}:*")}
    with pytest.raises(LeaseLostError, match=record.id):
        FENCED[act](job_store, lease)
    job_store.release(lease)
    assert {key: raw.dump(key) for key in raw.keys(f"{job_store._namespace}:*")} == before


def test_the_same_acts_with_a_good_lease_do_something(job_store: JobStore) -> None:
    for act in set(FENCED) - {"an illegal event"}:
        record, lease = claimed(job_store, *TO_RUNNING)
        FENCED[act](job_store, lease)
        assert job_store.get(record.id).state in {JobState.RUNNING, JobState.COMMITTING}
        job_store.apply(record.id, Failed(ERROR), lease.token)
