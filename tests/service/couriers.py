"""Couriers in a hurry, and jobs that give them something to deliver."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from service.jobs.jobstore import JobStore, Lease
from service.jobs.transitions import CancelRequested
from service.settings import Settings
from service.webhooks.courier import Courier
from service.webhooks.posting import post
from service.webhooks.store import WebhookStore
from service.webhooks.webhooks import Backoff, Delivery, Webhook
from tests.service.job_steps import fresh

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
FAST = Backoff(first_s=0.02, factor=1.5, longest_s=0.1)


def courier(store: WebhookStore, **options: Any) -> Courier:
    """A courier that may go to loopback, and is in a hurry."""
    settings = Settings(webhook_allow_private=("127.0.0.1",), webhook_secret=options.pop("secret", None))
    chosen = {"backoff": FAST, "threads": 2, "post": partial(post, deadline_s=0.5), **options}
    return Courier(store, settings, **chosen)


def job(jobs: JobStore, url: str, *events: str, secret: str = SECRET) -> Lease:
    """The lease of a job with a webhook."""
    record = fresh(time.time())
    jobs.create(record, None, Webhook(url, events or ("succeeded", "failed", "cancelled"), secret))
    lease = jobs.acquire(record.id, "owner", 60)
    assert lease is not None
    return lease


def cancelled(jobs: JobStore, url: str, secret: str = SECRET) -> str:
    """A job that ends at once."""
    lease = job(jobs, url, secret=secret)
    jobs.apply(lease.job, CancelRequested())
    return lease.job


def until(condition: Callable[[], Any], seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
    return found


def ended(store: WebhookStore, job: str) -> Delivery:
    """The job's only delivery, once it has ended."""

    def look() -> Delivery | None:
        found = store.deliveries(job).deliveries
        return found[0] if len(found) == 1 and found[0].state != "pending" else None

    found: Delivery = until(look)
    return found
