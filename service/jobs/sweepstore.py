"""What is over, in Redis: jobs that have ended, and who sweeps. The keys are in :mod:`service.jobs.sweepscripts`."""

from __future__ import annotations

import secrets
from typing import Any, Final

from service.jobs import sweepscripts as scripts
from service.jobs.jobkeys import JobKeys
from service.jobs.record import JobState
from service.redis_connection import connect, guarded
from workers.errors import ConflictError, IllegalTransitionError, JobNotFoundError

PAGE: Final = 100
"""Jobs that are looked at, or forgotten, before it is asked anew which."""


class SweepStore(JobKeys):
    """Jobs that have ended. Safe to share between threads.

    Every method raises :class:`~workers.errors.JobStoreUnavailableError` when Redis cannot be reached. Times are
    Unix seconds by Redis's clock.
    """

    def __init__(self, url: str, namespace: str = "mergemill") -> None:
        super().__init__(connect(url), namespace)

    @guarded
    def now(self) -> float:
        """The time."""
        seconds, microseconds = self._redis.time()
        return float(seconds + microseconds / 1e6)

    @guarded
    def lead(self, owner: str, ttl_s: float) -> bool:
        """Take, or keep, the right to sweep for a while; whether it is this owner's."""
        return bool(self._run(scripts.LEAD, (self._key("sweeper"),), owner, round(ttl_s * 1000)))

    @guarded
    def retire(self, owner: str) -> None:
        """Give the right up, if it is this owner's."""
        self._run(scripts.RETIRE, (self._key("sweeper"),), owner)

    @guarded
    def enrol(self) -> None:
        """List the jobs that ended before there was a list."""
        self._run(scripts.ENROL, (self._key(""),))

    @guarded
    def forget(self, job: str) -> None:
        """Forget a job that has ended, with everything that belongs to it but its output.

        :raises JobNotFoundError: there is none.
        :raises IllegalTransitionError: it has not ended.
        :raises ConflictError: its output is still being cleared away.
        """
        answer = self._forget(job, 0)
        if answer == "missing":
            raise JobNotFoundError(f"there is no job {job}")
        if answer == "held":
            raise ConflictError(f"what {job} left at its output is still being cleared away; try again later")
        if answer != "forgotten":
            raise IllegalTransitionError(
                f"{job} is {JobState(answer)}: cancel it, and delete it when it has ended"
            )

    @guarded
    def forget_old(self, job: str, ended_before: float) -> bool:
        """Forget a job, if it ended before then and nobody works at it; whether this did."""
        return self._forget(job, _milliseconds(ended_before)) == "forgotten"

    @guarded
    def ended(self, before: float) -> tuple[str, ...]:
        """Jobs that ended before then, the oldest first; a page of them."""
        return self._members("ended", before)

    @guarded
    def unswept(self, ended_before: float) -> tuple[str, ...]:
        """Jobs whose output is to be looked at: those that left something, and those that ended before then."""
        return self._members("unswept", ended_before)

    @guarded
    def left(self, job: str) -> bool:
        """Whether a job is known to have left something at its output."""
        return bool(self._redis.hexists(self._job(job), "left"))

    @guarded
    def swept(self, job: str) -> None:
        """A job's output has been looked at, and holds nothing that should not be there."""
        self._run(scripts.SWEPT, (self._job(job), self._key("unswept")), job)

    @guarded
    def postpone(self, job: str, until: float) -> None:
        """Look at a job's output when those are looked at that ended at this time."""
        self._redis.zadd(self._key("unswept"), {job: _milliseconds(until)}, xx=True)

    def _members(self, name: str, before: float) -> tuple[str, ...]:
        found: Any = self._redis.zrange(
            self._key(name), "-inf", f"({_milliseconds(before)}", byscore=True, offset=0, num=PAGE
        )
        return tuple(found)

    def _forget(self, job: str, before_ms: int) -> str:
        keys = (self._job(job), self._key("jobs"), self._key("active"))
        return str(self._run(scripts.FORGET, keys, job, before_ms, secrets.token_hex(8)))


def _milliseconds(time: float) -> int:
    return round(time * 1000)
