"""Webhooks in Redis: who is to be told, what is due, and what became of it.

Keys beside those of :mod:`service.jobs.jobstore`, after the same namespace:

===========================  ==========  ===============================================================
``webhooks``                 sorted set  ``<job id> <event id>`` of what has to be sent, by when it is due (ms)
``webhooks:claim:<nonce>``   string      the member that somebody is sending; expires when the claim does
``job:<id>:webhook``         hash        ``url``, ``events``, ``secret``, and ``gone`` once it answered 410
``job:<id>:deliveries``      hash        event id → its fields (JSON); ``<event id>:tries`` and ``:end``
``job:<id>:tries``           hash        nonce of the claim → JSON of the :class:`~service.webhooks.webhooks.Try`
===========================  ==========  ===============================================================

A delivery is queued in the step that writes its event (:data:`service.jobs.eventscripts.TELL`). Redis's clock is the
only one that counts, so the machines of couriers may differ in theirs.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from service.jobs.events import JobEvent, read_event
from service.jobs.record import JOB_ID
from service.redis_connection import RedisKeys, connect, guarded
from service.webhooks import scripts
from service.webhooks.webhooks import Delivery, Try, message_id
from workers.errors import JobNotFoundError


@dataclass(frozen=True, slots=True)
class Claim:
    """A delivery that is ours to make, for a while."""

    nonce: str
    """The claim's name."""
    event: JobEvent
    """What to tell."""
    number: int
    """Which try this is, from 1."""
    url: str
    """Where to send it."""
    secret: str = field(repr=False)
    """What to sign with; empty for the deployment's own."""


@dataclass(frozen=True, slots=True)
class Deliveries:
    """All that a job's webhook was told, or is to be."""

    url: str | None
    """Where it is; ``None`` when the job has none."""
    events: tuple[str, ...]
    """What it wants to be told."""
    deliveries: tuple[Delivery, ...]
    """In the order of the events."""


class WebhookStore(RedisKeys):
    """The durable queue of webhooks. Safe to share between threads.

    Every method raises :class:`~workers.errors.JobStoreUnavailableError` when Redis cannot be reached.
    """

    def __init__(self, url: str, namespace: str = "mergemill") -> None:
        super().__init__(connect(url), namespace)

    @guarded
    def claim(self, ttl_s: float) -> Claim | None:
        """Take what has been due for longest; ``None`` when nothing is. After ``ttl_s`` others may take it, too."""
        nonce = secrets.token_hex(8)
        keys = (self._key("webhooks"), self._claim(nonce), self._key("job"))
        found: Any = self._run(scripts.CLAIM, keys, round(ttl_s * 1000))
        if found is None:
            return None
        job, event, fields, number, url, secret = found
        return Claim(nonce, _event(job, event, fields), int(number), url, secret)

    @guarded
    def finish(self, claim: Claim, done: Try, outcome: str, pause_s: float = 0.0) -> None:
        """Record a try and what becomes of the delivery: ``delivered``, ``failed``, ``gone``, or ``again``.

        :param pause_s: when to try again, in seconds from now.
        """
        job, event = claim.event.job, claim.event.id
        keys = (self._key("webhooks"), self._claim(claim.nonce), self._key("job", job))
        pause = round(pause_s * 1000)
        args = (job, event, claim.nonce, done.to_json(), outcome, pause)
        self._run(scripts.FINISH, keys, *args)

    @guarded
    def deliveries(self, job: str) -> Deliveries:
        """What a job's webhook was told, or is to be.

        :raises JobNotFoundError: there is no such job.
        """
        if not JOB_ID.fullmatch(job):
            raise JobNotFoundError(f"there is no job {job}")
        key = self._key("job", job)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.exists(key)
            pipe.hmget(f"{key}:webhook", "url", "events")
            pipe.hgetall(f"{key}:deliveries")
            pipe.hvals(f"{key}:tries")
            there, (url, events), found, tried = pipe.execute()
        if not there:
            raise JobNotFoundError(f"there is no job {job}")
        ids = sorted((name for name in found if ":" not in name), key=_order)
        due: Any = (
            self._redis.zmscore(self._key("webhooks"), [f"{job} {name}" for name in ids]) if ids else []
        )
        tries = sorted((Try(**json.loads(text)) for text in tried), key=lambda done: (done.number, done.at))
        return Deliveries(
            url,
            tuple((events or "").split()),
            tuple(
                Delivery(
                    id=message_id(job, name),
                    event=_event(job, name, found[name]).event,
                    state=found.get(f"{name}:end", "pending"),
                    tries=tuple(done for done in tries if done.delivery == name),
                    next_at=None if score is None else score / 1000,
                )
                for name, score in zip(ids, due, strict=True)
            ),
        )

    def _claim(self, nonce: str) -> str:
        return self._key("webhooks", "claim", nonce)


def _event(job: str, event: str, fields: str) -> JobEvent:
    pairs = iter(json.loads(fields))
    return read_event(job, event, dict(zip(pairs, pairs, strict=True)))


def _order(event: str) -> tuple[int, ...]:
    return tuple(map(int, event.split("-")))
