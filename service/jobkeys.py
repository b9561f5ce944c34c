"""What everything that keeps something about jobs in Redis does alike: names of keys, scripts, checks of leases."""

from __future__ import annotations

from typing import Any, Self

import redis

from service.jobrecord import JOB_ID
from service.leases import Lease
from workers.errors import JobNotFoundError, LeaseLostError


class JobKeys:
    """A connection, and the namespace that its keys are in. A context manager that closes the connection."""

    def __init__(self, connection: redis.Redis, namespace: str) -> None:
        self._redis = connection
        self._namespace = namespace

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _key(self, *names: str) -> str:
        return ":".join((self._namespace, *names))

    def _job(self, job: str) -> str:
        if not JOB_ID.fullmatch(job):  # ids come from URLs; "<id>:parts" must not be one
            raise JobNotFoundError(f"there is no job {job}")
        return self._key("job", job)

    def _run(self, script: str, keys: tuple[str, ...], *arguments: str | int) -> Any:
        return self._redis.register_script(script)(keys=list(keys), args=list(arguments))

    @staticmethod
    def _check(lease: Lease, answer: str | int) -> None:
        if answer == "fenced":
            raise LeaseLostError(f"{lease.job}: the lease {lease.token} is not in force")
