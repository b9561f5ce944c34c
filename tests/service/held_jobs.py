"""Jobs of a store, and the leases that a test has on them."""

from __future__ import annotations

import time

from service.jobs.jobstore import JobStore, Lease
from service.jobs.record import JobRecord
from service.jobs.transitions import Event
from tests.service.job_steps import fresh


def claimed(store: JobStore, *events: Event, ttl_s: float = 60) -> tuple[JobRecord, Lease]:
    """A job of our own that the events have happened to."""
    record = fresh(time.time())
    store.create(record)
    lease = store.acquire(record.id, "owner", ttl_s)
    assert lease is not None
    for event in events:
        record = store.apply(record.id, event, lease.token)
    return record, lease


def lose(store: JobStore, lease: Lease) -> Lease:
    """Let the lease run out, and somebody else take the job."""
    store.release(lease)
    other = store.acquire(lease.job, "usurper", 60)
    assert other is not None
    return other
