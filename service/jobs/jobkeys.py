"""What everything that keeps something about jobs in Redis does alike: names of their keys, checks of leases."""

from __future__ import annotations

from service.jobs.leases import Lease
from service.jobs.record import JOB_ID
from service.redis_connection import RedisKeys
from workers.errors import JobNotFoundError, LeaseLostError


class JobKeys(RedisKeys):
    """Keys of jobs."""

    def _job(self, job: str) -> str:
        if not JOB_ID.fullmatch(job):  # ids come from URLs; "<id>:parts" must not be one
            raise JobNotFoundError(f"there is no job {job}")
        return self._key("job", job)

    @staticmethod
    def _check(lease: Lease, answer: str | int) -> None:
        if answer == "fenced":
            raise LeaseLostError(f"{lease.job}: the lease {lease.token} is not in force")
