"""Which job an output belongs to, in Redis: of several jobs for one place, one has it."""

from __future__ import annotations

import time
from typing import Final

from service.jobs import jobscripts as scripts
from service.jobs.jobkeys import JobKeys
from service.jobs.leases import Lease
from service.jobs.record import JOB_ID
from service.redis_connection import guarded
from workers.errors import OutputConflictError

WAIT_S: Final = 60.0
"""How long an output is waited for that a job which has ended there is still clearing up, in seconds."""

POLL_S: Final = 0.1
"""How often it is asked for, in seconds."""


class Outputs(JobKeys):
    """Claims on outputs; part of :class:`service.jobs.jobstore.JobStore`."""

    @guarded
    def claim_output(self, lease: Lease, uri: str) -> None:
        """Claim the normalised output ``uri`` for the lease's job; again is no error.

        While a job that has ended there is still clearing up, it is waited for.

        :raises OutputConflictError: an unfinished job has claimed it.
        """
        keys = (self._job(lease.job), self._key("output", uri), self._key("active"))
        deadline = time.monotonic() + WAIT_S
        while (answer := self._run(scripts.CLAIM_OUTPUT, keys, lease.token, lease.job)) != "claimed":
            self._check(lease, answer)
            if answer != "busy":
                raise OutputConflictError(
                    f"{uri} is the output of {self.name(lease.job, answer)}, which goes on"
                )
            if time.monotonic() > deadline:
                raise OutputConflictError(f"{uri} is being cleared up after a job that has ended")
            time.sleep(POLL_S)

    @guarded
    def release_output(self, lease: Lease, uri: str) -> None:
        """Give up the claim on ``uri``, if the lease's job has it."""
        keys = (self._job(lease.job), self._key("output", uri))
        self._check(lease, self._run(scripts.RELEASE_OUTPUT, keys, lease.token, lease.job))

    @guarded
    def name(self, to: str, other: str) -> str:
        """What to call a job in what those read who follow the job ``to``: that of another API key has no name."""
        if JOB_ID.fullmatch(other):
            ours, theirs = (self._redis.hget(self._job(job), "key") for job in (to, other))
            if theirs is not None and ours != theirs:
                return "another job"
        return f"the job {other}"
