"""What the job store tells about jobs: one with its progress, and pages of them with their cursors. Pure."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from service.jobs.progress import Progress
from service.jobs.record import JOB_ID, JobRecord
from workers.errors import CursorError


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job's record and how far it is, all of one moment."""

    record: JobRecord
    """The record."""
    parts_done: int = 0
    """Finished parts."""
    bytes_done: int = 0
    """Output bytes in them."""
    bytes_read: int = 0
    """Input bytes that they and the surveys fetched."""
    surveys_done: int = 0
    """Finished survey passes."""
    owner: str | None = None
    """Who holds the lease, if anybody does."""

    @property
    def progress(self) -> Progress:
        """How far it is."""
        record = self.record
        return Progress(
            bytes_done=self.bytes_done,
            bytes_total=record.bytes_total,
            bytes_read=self.bytes_read,
            parts_done=self.parts_done,
            parts_total=record.parts_total,
            surveys_done=self.surveys_done,
            surveys_total=record.surveys_total,
        )


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some jobs, newest first, all of one moment."""

    statuses: tuple[JobStatus, ...]
    """The jobs, with their progress."""
    cursor: str | None
    """Where the next page begins; ``None`` when there is none."""

    @property
    def records(self) -> tuple[JobRecord, ...]:
        """The jobs' records."""
        return tuple(status.record for status in self.statuses)


def read_status(row: Sequence[Any]) -> JobStatus:
    """The status that Redis tells as ``record, parts, [bytes_done, bytes_read], surveys, owner``."""
    record, parts, (done, read), surveys, owner = row
    found = JobRecord.model_validate_json(record)
    return JobStatus(found, parts, int(done or 0), int(read or 0), surveys, owner)


def page_of(rows: Sequence[Sequence[Any]], limit: int) -> JobPage:
    """The page of at most ``limit`` jobs; one row more says that there is another page."""
    statuses = tuple(read_status(row) for row in rows[:limit])
    return JobPage(statuses, write_cursor(statuses[-1].record.id) if len(rows) > limit else None)


def write_cursor(job: str) -> str:
    """An opaque cursor after this job: clients must not build one, or take one apart."""
    return base64.urlsafe_b64encode(job.encode()).decode().rstrip("=")


def read_cursor(cursor: str) -> str:
    """The id of the job that the page before ended with.

    :raises CursorError: it is not a cursor that a page gave out.
    """
    try:
        job = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except ValueError:  # binascii's and Unicode's errors are both
        job = ""
    if not JOB_ID.fullmatch(job):
        raise CursorError("the cursor is not one that a page gave out")
    return job
