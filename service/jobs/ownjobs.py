"""The job store as one API key sees it: its own jobs, or all of them for an admin's."""

from __future__ import annotations

from service.jobs.idempotency import Once
from service.jobs.jobstore import JobStore
from service.jobs.pages import JobPage, JobStatus
from service.jobs.record import JobRecord, JobState
from service.jobs.transitions import Event
from service.keys import ANYBODY, ApiKey, Limits
from service.webhooks.webhooks import Webhook
from workers.errors import JobNotFoundError


class OwnJobs:
    """What somebody may do with jobs over the API. Those of others are not there.

    Every method raises what :class:`~service.jobs.jobstore.JobStore`'s does.
    """

    def __init__(self, jobs: JobStore, caller: ApiKey, limits: Limits) -> None:
        self._jobs = jobs
        self._caller = caller
        self._limits = limits

    @property
    def key(self) -> str | None:
        """Id of the caller's key; ``None`` where there are none."""
        return None if self._caller is ANYBODY else self._caller.id

    def create(self, record: JobRecord, once: Once | None = None, webhook: Webhook | None = None) -> str:
        """Store a new job of the caller's, unless the same request has made one before; its id, or that one's.

        :raises TooManyRequestsError: as many as its key may have wait already.
        """
        return self._jobs.create(record, once, webhook, self._limits.queued_jobs)

    def made_by(self, once: Once | None) -> str | None:
        """The job that the same request of the caller's has made before: its key is part of ``once``."""
        return self._jobs.made_by(once)

    def get(self, job: str) -> JobRecord:
        """The job's record."""
        record = self._jobs.get(job)
        self._check(record)
        return record

    def status(self, job: str) -> JobStatus:
        """The job's record, progress and owner."""
        status = self._jobs.status(job)
        self._check(status.record)
        return status

    def list(self, limit: int, cursor: str | None = None, state: JobState | None = None) -> JobPage:
        """The newest jobs, a page of them."""
        return self._jobs.list(limit, cursor, state, None if self._caller.is_admin else self._caller.id)

    def apply(self, job: str, event: Event) -> JobRecord:
        """Advance the job by an event that needs no lease."""
        self.get(job)
        return self._jobs.apply(job, event)

    def _check(self, record: JobRecord) -> None:
        if not self._caller.is_admin and record.key != self._caller.id:
            raise JobNotFoundError(f"there is no job {record.id}")
