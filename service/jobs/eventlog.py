"""What was told about jobs, read by an event loop. The keys are in the table of :mod:`service.jobs.jobstore`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import redis

from service.jobs.events import JobEvent, read_event
from service.jobs.record import JOB_ID, JobState
from service.redis_connection import TIMEOUT_S, connect_async, unavailable
from workers.errors import JobNotFoundError

READERS: Final = 8
"""Connections for streams that have something to read; whoever comes when all are in use waits for a moment."""

BLOCK_MS: Final = int(TIMEOUT_S * 400)
"""How long Redis may wait for news before it answers that there are none; less than a connection's timeout."""


@dataclass(frozen=True, slots=True)
class Look:
    """What there is of a job's stream after some event, and the job's state at that moment."""

    events: tuple[JobEvent, ...]
    """The next events."""
    state: JobState
    """The job's state after all of its events, not only these."""


class EventLog:
    """The events of a deployment's jobs. Belongs to one event loop; every method raises
    :class:`~workers.errors.JobStoreUnavailableError` when Redis cannot be reached.
    """

    def __init__(self, url: str, namespace: str = "mergemill") -> None:
        self._readers = connect_async(url, max_connections=READERS)
        self._waiter = connect_async(url)
        self._namespace = namespace

    async def close(self) -> None:
        """Close all connections."""
        await self._readers.aclose()
        await self._waiter.aclose()

    async def look(self, job: str, after: str | None = None, count: int = 100) -> Look:
        """Up to ``count`` events of the job after the one with the id ``after``, read in one step with its state.

        :raises JobNotFoundError: there is no such job.
        """
        if not JOB_ID.fullmatch(job):
            raise JobNotFoundError(f"there is no job {job}")
        key = f"{self._namespace}:job:{job}"
        try:
            async with self._readers.pipeline(transaction=True) as pipe:
                pipe.xrange(f"{key}:events", "-" if after is None else f"({after}", "+", count)
                pipe.hget(key, "state")
                rows, state = await pipe.execute()
        except redis.RedisError as error:
            raise unavailable(error) from error
        if state is None:
            raise JobNotFoundError(f"there is no job {job}")
        return Look(tuple(read_event(job, *row) for row in rows), JobState(state))

    async def newest(self) -> str:
        """Where the feed of all jobs ends now."""
        try:
            rows: Any = await self._waiter.xrevrange(f"{self._namespace}:events", count=1)
        except redis.RedisError as error:
            raise unavailable(error) from error
        return str(rows[0][0]) if rows else "0-0"

    async def news(self, after: str) -> tuple[str, frozenset[str]]:
        """Wait for news of any job, for a while: where the feed ends then, and the ids of the jobs."""
        try:
            found: Any = await self._waiter.xread({f"{self._namespace}:events": after}, 1000, BLOCK_MS)
        except redis.RedisError as error:
            raise unavailable(error) from error
        if not found:
            return after, frozenset()
        rows = found[0][1]
        return str(rows[-1][0]), frozenset(fields["job"] for _, fields in rows)
