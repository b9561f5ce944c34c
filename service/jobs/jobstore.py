"""Jobs in Redis: records, leases, finished parts, claims on outputs.

Every key, after the namespace (``mergemill:`` unless told otherwise):

===========================  ==========  ===============================================================
``jobs``                     sorted set  every job id, all with score 0, so in the order of the ids
``jobs:<state>``             sorted set  the ids of the jobs in that state, likewise
``active``                   sorted set  the ids of the jobs that are not in a final state, likewise
``leases``                   string      counter of all leases ever given out
``output:<uri>``             string      id of the job that claims this output
``once:<key>``               hash        ``job`` and request's ``fingerprint`` of an idempotency key; expires
``events``                   stream      ids of the jobs that have news, for those who wait for any job's
``job:<id>``                 hash        ``record`` (JSON of the JobRecord), its ``version``, ``state`` and ``totals``,
                                         and what :mod:`service.jobs.queuescripts` keeps, as it does more keys
``job:<id>:events``          stream      what happened to the job, see :mod:`service.jobs.events`
``job:<id>:writes``          list        nonces of the latest writes of the record
``job:<id>:lease``           hash        ``token`` and ``owner``; expires when the lease does
``job:<id>:parts``           hash        part id → JSON of the PartResult
``job:<id>:surveys``         hash        ``<survey id>:<pass>`` → JSON of the facts
``job:<id>:progress``        hash        ``bytes_done`` (output), ``bytes_read`` (input), ``told_at`` (last event)
===========================  ==========  ===============================================================

Everything that changes a job's keys under a lease checks the lease's token in the same Lua script, so an
owner that was paused past its lease changes nothing. Connections are retried, and Redis may have acted
before a connection broke; every script therefore gives the same answer when it is run again: the record's
by a nonce, leases by their token's random epoch. Scripts build key names from ids: Redis Cluster, where all
keys of a script have to be named in advance and live in one slot, is not supported. There are
more in :mod:`service.webhooks.store`, :mod:`service.keystore`, :mod:`service.watching.deployment` and
:mod:`service.jobs.sweepscripts`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Final

from service.jobs import jobscripts as scripts
from service.jobs.events import telling
from service.jobs.eventscripts import WARN
from service.jobs.idempotency import Once
from service.jobs.leases import Lease
from service.jobs.outputs import Outputs
from service.jobs.pages import JobPage, JobStatus, page_of, read_cursor, read_status
from service.jobs.queuescripts import CLAIM_NEXT
from service.jobs.record import JobRecord, JobState
from service.jobs.transitions import (
    DETAIL_CHARS,
    Cancelled,
    CancelRequested,
    Event,
    Failed,
    Restarted,
    advance,
)
from service.redis_connection import CONNECTION_TRIES, connect, durability_warnings, guarded
from service.webhooks.webhooks import Webhook
from workers.errors import (
    ConflictError,
    IdempotencyMismatchError,
    JobNotFoundError,
    LeaseLostError,
    TooManyRequestsError,
)
from workers.task import PART_RESULT, Facts, PartResult

__all__ = ("CONFLICT_TRIES", "QUEUE_RETRY_S", "REMEMBERED_WRITES", "JobStatus", "JobStore", "Lease")

CONFLICT_TRIES: Final = 20
"""How often :meth:`JobStore.apply` reads and writes again when somebody else wrote in between."""

REMEMBERED_WRITES: Final = 32
"""Nonces kept a job: how many other writes may come between a write and the retry that looks for it."""

QUEUE_RETRY_S: Final = 30
"""When it may be worth it to try again to have a job queued, in seconds."""


class JobStore(Outputs):
    """Jobs in Redis ≥ 7.0 or Valkey. Safe to share between threads; survives a restart of the server.

    Every method raises :class:`JobStoreUnavailableError` when Redis cannot be reached or refuses to work,
    and every method that is given a lease raises :class:`LeaseLostError` when it is not in force any more.
    """

    def __init__(
        self, url: str, namespace: str = "mergemill", *, clock: Callable[[], float] = time.time
    ) -> None:
        super().__init__(connect(url, CONNECTION_TRIES), namespace)
        self._clock = clock

    # Records

    @guarded
    def create(
        self,
        record: JobRecord,
        once: Once | None = None,
        webhook: Webhook | None = None,
        most_queued: int = 0,
    ) -> str:
        """Store a new job, unless the same request has made one before; its id, or that one's.

        :param webhook: who is to be told about it.
        :param most_queued: how many jobs of its key may wait, this one included; 0 is any number.
        :raises ConflictError: there is one with this id.
        :raises IdempotencyMismatchError: the idempotency key came with another request.
        :raises TooManyRequestsError: as many of its key wait already.
        """
        fields = (record.id, secrets.token_hex(8), record.model_dump_json(), record.version, record.state)
        known = ("", 0) if once is None else (once.fingerprint, _milliseconds(once.ttl_s))
        remembered = self._key("once", "" if once is None else once.key)
        keys = (self._job(record.id), self._key("jobs"), self._key("active"), remembered)
        told = telling(None, record)[:2]
        place = (record.key or "", -record.priority, most_queued)
        hook = () if webhook is None else (webhook.url, f" {' '.join(webhook.events)} ", webhook.secret)
        answer = str(
            self._run(scripts.CREATE, keys, *fields, _terminal(record), *known, *told, *place, *hook)
        )
        if answer == "another":
            raise IdempotencyMismatchError(
                "this Idempotency-Key came with another request before: every request needs one of its own"
            )
        if answer == "full":
            waits = f"{most_queued} jobs of the key {record.key} wait, as many as may"
            raise TooManyRequestsError(f"{waits}: try again when one has begun", QUEUE_RETRY_S)
        if answer == "exists":
            raise ConflictError(f"there is already a job {record.id}")
        return answer

    @guarded
    def made_by(self, once: Once | None) -> str | None:
        """The job that the same request has made before, if it has and is remembered."""
        if once is None:
            return None
        fingerprint, job = self._redis.hmget(self._key("once", once.key), "fingerprint", "job")
        return str(job) if fingerprint == once.fingerprint else None

    @guarded
    def get(self, job: str) -> JobRecord:
        """The job's record.

        :raises JobNotFoundError: there is none.
        """
        return self._parse(job, self._redis.hget(self._job(job), "record"))

    @guarded
    def version(self, job: str) -> int | None:
        """The version of the job's record, for a fraction of what reading it costs; ``None`` when there is none."""
        found: Any = self._redis.hget(self._job(job), "version")
        return None if found is None else int(found)

    @guarded
    def status(self, job: str) -> JobStatus:
        """The job's record, progress and owner, read in one transaction.

        :raises JobNotFoundError: there is none.
        """
        key = self._job(job)
        with self._redis.pipeline(transaction=True) as pipe:
            pipe.hget(key, "record")
            pipe.hlen(f"{key}:parts")
            pipe.hmget(f"{key}:progress", "bytes_done", "bytes_read")
            pipe.hlen(f"{key}:surveys")
            pipe.hget(f"{key}:lease", "owner")
            row = pipe.execute()
        if row[0] is None:
            raise JobNotFoundError(f"there is no job {job}")
        return read_status(row)

    @guarded
    def list(
        self, limit: int, cursor: str | None = None, state: JobState | None = None, key: str | None = None
    ) -> JobPage:
        """The newest ``limit`` jobs, or those after ``cursor``; only those in ``state`` or of ``key``, if given.

        New jobs come before every cursor, so paging neither repeats nor skips because of them. Records and
        progress are read in one step: no page of running jobs shows one that has ended.

        :raises ValueError: the limit is below 1.
        :raises CursorError: the cursor is none of ours.
        """
        if limit < 1:
            raise ValueError("limit must be at least 1")
        whose = "jobs" if key is None else f"jobs@{key}"
        index = self._key(whose) if state is None else self._key(whose, state)
        start = "+" if cursor is None else f"({read_cursor(cursor)}"
        found = self._run(scripts.PAGE, (index, self._key("job")), start, limit + 1)
        return page_of(found, limit)

    @guarded
    def apply(self, job: str, event: Event, token: str | None = None) -> JobRecord:
        """Advance the job by ``event`` and store the result, if nobody else did anything in between.

        When others did, the event is tried again on what they made of the record.
        :class:`~service.jobs.transitions.Restarted` forgets all parts and surveys in the same step.

        :param token: the lease's; only :class:`~service.jobs.transitions.CancelRequested` needs none.
        :raises JobNotFoundError: there is no such job.
        :raises IllegalTransitionError: its state does not allow the event.
        :raises LeaseLostError: the token's lease is not in force.
        :raises ConflictError: others kept changing the record.
        """
        if token is None and not isinstance(event, CancelRequested):
            raise ValueError(f"{type(event).__name__} needs the token of a lease")
        key, nonce = self._job(job), secrets.token_hex(8)
        for _ in range(CONFLICT_TRIES):
            with self._redis.pipeline(transaction=True) as pipe:
                pipe.hget(key, "record")
                pipe.hget(f"{key}:lease", "token")
                text, held = pipe.execute()
            record = self._parse(job, text)
            if token is not None and held != token:  # else a former owner would see an illegal transition
                raise LeaseLostError(f"{job}: the lease {token} is not in force")
            after = advance(record, event, self._clock())
            effect = "restarted" if isinstance(event, Restarted) else _terminal(after)
            fields = (after.model_dump_json(), after.version, after.state, REMEMBERED_WRITES, effect)
            keys = (key, self._key("jobs"), self._key("active"), self._key("output", record.output))
            told = telling(record, after)
            left = event.left if isinstance(event, Cancelled | Failed) else ""
            answer = self._run(
                scripts.SAVE, keys, job, nonce, token or "", record.version, *fields, *told, left
            )
            if answer == "saved":
                return after
            if answer == "fenced":
                raise LeaseLostError(f"{job}: the lease {token} is not in force")
        raise ConflictError(f"{job}: it changed {CONFLICT_TRIES} times while {event} was to be stored")

    @guarded
    def warn(self, lease: Lease, detail: str) -> None:
        """Tell those who follow the job that something went wrong, and that it goes on."""
        entry = json.dumps({"at": self._clock(), "detail": detail[:DETAIL_CHARS]})
        fields = (lease.token, secrets.token_hex(8), REMEMBERED_WRITES, entry)
        self._check(lease, self._run(WARN, (self._job(lease.job),), *fields))

    # Leases

    @guarded
    def claim_next(
        self, owner: str, ttl_s: float, most_running: int = 0, most_of_key: int = 0
    ) -> tuple[JobRecord, Lease] | None:
        """Take the lease of an unfinished job that nobody holds; ``None`` when there is none, or no room.

        That with the highest priority; then one of the key that has the fewest running; then the oldest.

        :param most_running: how many jobs may run at once, whoever's scheduler they are; 0 is any number.
        :param most_of_key: how many of one key, where the key has no limit of its own; 0 is any number.
        """
        keys = (self._key("leases"), self._key("active"), self._key("job"))
        most = (most_running, most_of_key)
        found = self._run(CLAIM_NEXT, keys, secrets.token_hex(8), owner, _milliseconds(ttl_s), *most)
        if found is None:
            return None
        record = JobRecord.model_validate_json(found[0])
        return record, Lease(record.id, found[1], owner, ttl_s)

    @guarded
    def acquire(self, job: str, owner: str, ttl_s: float) -> Lease | None:
        """Take the lease of this job; ``None`` when somebody holds it.

        :raises JobNotFoundError: there is no such job.
        """
        keys = (self._key("leases"), self._job(job))
        token = self._run(scripts.ACQUIRE, keys, secrets.token_hex(8), owner, _milliseconds(ttl_s))
        if token == "missing":  # noqa: S105 - an answer of the script
            raise JobNotFoundError(f"there is no job {job}")
        return None if token is None else Lease(job, token, owner, ttl_s)

    @guarded
    def renew(self, lease: Lease) -> None:
        """Let the lease last another ``ttl_s`` from now."""
        keys = (self._job(lease.job), self._key("leases"))
        if not self._run(scripts.RENEW, keys, lease.token, _milliseconds(lease.ttl_s)):
            raise LeaseLostError(f"{lease.job}: the lease {lease.token} is not in force")

    @guarded
    def release(self, lease: Lease) -> None:
        """Give the lease back; it is no error when it is not in force any more."""
        self._run(scripts.RELEASE, (self._job(lease.job), self._key("leases")), lease.token)

    # Finished work

    @guarded
    def record_part(self, lease: Lease, *results: PartResult) -> int:
        """Record finished parts, each once and all in one step; how many of them this call recorded.

        Too few may also mean that it did, and that the first answer was lost.

        :raises ConflictError: the job is not running, so it has no uploads that the parts could belong to.
        """
        records = [
            (each.part, PART_RESULT.dump_json(each).decode(), each.size, each.bytes_read) for each in results
        ]
        return self._record(lease, "parts", JobState.RUNNING, records)

    @guarded
    def parts(self, job: str) -> dict[str, PartResult]:
        """The recorded parts by id."""
        found: dict[str, str] = self._redis.hgetall(f"{self._job(job)}:parts")  # type: ignore[assignment]
        return {part: PART_RESULT.validate_json(text) for part, text in found.items()}

    @guarded
    def record_survey(self, lease: Lease, survey: str, index: int, facts: Facts, bytes_read: int) -> bool:
        """Record what pass ``index`` of a survey found out, once; whether this call did it."""
        return bool(
            self._record(lease, "surveys", "", [(f"{survey}:{index}", json.dumps(facts), 0, bytes_read)])
        )

    @guarded
    def surveys(self, job: str) -> dict[tuple[str, int], Facts]:
        """The recorded facts by survey id and pass."""
        found: dict[str, str] = self._redis.hgetall(f"{self._job(job)}:surveys")  # type: ignore[assignment]
        keyed = ((name.rpartition(":"), text) for name, text in found.items())
        return {(survey, int(index)): json.loads(text) for (survey, _, index), text in keyed}

    @guarded
    def ping(self) -> None:
        """Ask whether Redis is there."""
        self._redis.ping()

    @guarded
    def durability_warnings(self) -> tuple[str, ...]:
        """A sentence for each setting of this Redis that could lose what it has acknowledged."""
        return durability_warnings(self._redis)

    def _record(self, lease: Lease, kind: str, state: str, records: Iterable[tuple[str | int, ...]]) -> int:
        """Records are name, text, bytes done and bytes read; how many were new."""
        key = self._job(lease.job)
        answer = self._run(
            scripts.RECORD, (key, f"{key}:{kind}"), lease.token, state, *chain.from_iterable(records)
        )
        self._check(lease, answer)
        if isinstance(answer, str):
            raise ConflictError(f"{lease.job}: {kind} are not recorded, {answer}")
        return int(answer)

    @staticmethod
    def _parse(job: str, text: Any) -> JobRecord:
        if text is None:
            raise JobNotFoundError(f"there is no job {job}")
        return JobRecord.model_validate_json(text)


def _terminal(record: JobRecord) -> str:
    return "terminal" if record.state.is_terminal else ""


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
