"""A job's record, and what its id and its states are. Pure: no Redis, no clock, no network.

What may happen to it is in :mod:`service.jobs.transitions`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from service.keys import Access
from workers.task import JSONValue

HISTORY_LIMIT = 100
"""Entries that a record's history keeps: the first one and the latest."""

_BASE32 = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: sorts as the number does, and no i, l, o, u
JOB_ID = re.compile(rf"merge-[0-7][{_BASE32}]{{25}}")
"""What a job id looks like."""


def new_job_id(now: float) -> str:
    """A fresh job id that sorts by time: ``merge-`` and a lower-case ULID (48 bits of ms, 80 random bits)."""
    number = (int(now * 1000) & (2**48 - 1)) << 80 | secrets.randbits(80)
    return "merge-" + "".join(_BASE32[number >> shift & 31] for shift in range(125, -1, -5))


def created_at_ms(job: str) -> int:
    """When a job got its id, in Unix milliseconds."""
    number = 0
    for digit in job.removeprefix("merge-")[:10]:
        number = number << 5 | _BASE32.index(digit)
    return number


class JobState(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    PLANNING = "planning"
    RUNNING = "running"
    COMMITTING = "committing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing can happen any more."""
        return self in {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HistoryEntry(_Frozen):
    """One thing that happened to a job."""

    at: float
    """When, in Unix seconds."""
    event: str
    """What: ``created``, or the event's name in snake case."""
    state: JobState
    """The state that it led to."""
    detail: str = ""
    """A few words for people."""


class JobRecord(_Frozen):
    """All that is known about a job, but for its finished parts and its lease; see :func:`new_job`."""

    id: str = Field(pattern=f"^{JOB_ID.pattern}$")
    """Its id; sorts by time of creation."""
    recipe: dict[str, JSONValue]
    """The canonical recipe as it was submitted."""
    output: str
    """Normalised URI of the output's prefix."""
    options: dict[str, JSONValue] = {}
    """What was asked for beside the recipe: shard size, overwriting, …"""
    origin: dict[str, str] = {}
    """Where it came from: ``request``, the id of the HTTP request, and its ``traceparent`` (W3C)."""
    key: str | None = None
    """Id of the API key that it was submitted with; ``None`` where no key was needed."""
    access: Access | None = None
    """Where it may read and write; ``None`` is everywhere."""
    priority: int = Field(default=0, ge=-100, le=100)
    """Jobs of higher priority are begun first."""
    state: JobState = JobState.QUEUED
    """Where it stands."""
    version: int = Field(default=1, ge=1)
    """Grows by one with every change; what compare-and-set compares."""
    created_at: float
    """When it was submitted, in Unix seconds."""
    updated_at: float
    """When it last changed, in Unix seconds; never runs backwards."""
    cancel_requested: bool = False
    """Whether somebody wants it to end; its scheduler sees to that."""
    attempt: int = Field(default=0, ge=0)
    """How often planning began."""
    plan_digest: str | None = None
    """SHA-256 of the plan's canonical JSON; a resumed job must plan to the same, or start over."""
    semantics_version: int | None = None
    """Version of the mathematics that the plan is for."""
    price: dict[str, JSONValue] | None = None
    """What the plan costs."""
    notices: tuple[str, ...] = ()
    """What the planner wants the user to know."""
    bytes_total: int = Field(default=0, ge=0)
    """Output bytes that the parts make together."""
    parts_total: int = Field(default=0, ge=0)
    """Parts in the plan."""
    surveys_total: int = Field(default=0, ge=0)
    """Survey passes in the plan."""
    uploads: dict[str, str] = {}
    """Multipart upload id by shard name; filled exactly from ``running`` on."""
    completed_shards: tuple[str, ...] = ()
    """Shards whose upload has been completed, in that order."""
    summary: dict[str, JSONValue] | None = None
    """What a succeeded job reports."""
    giving_up: dict[str, JSONValue] | None = None
    """Why it is about to fail, from when its uploads are aborted; see :class:`service.jobs.transitions.GivingUp`."""
    error: dict[str, JSONValue] | None = None
    """Why a failed job failed, as :func:`workers.errors.to_json` puts it."""
    history: tuple[HistoryEntry, ...] = ()
    """What happened, oldest first; at most :data:`HISTORY_LIMIT` entries."""


def new_job(
    recipe: Mapping[str, JSONValue],
    output: str,
    options: Mapping[str, JSONValue],
    now: float,
    origin: Mapping[str, str] | None = None,
    *,
    key: str | None = None,
    access: Access | None = None,
    priority: int = 0,
) -> JobRecord:
    """A queued job with a fresh id."""
    return JobRecord(
        id=new_job_id(now),
        recipe=dict(recipe),
        output=output,
        options=dict(options),
        origin=dict(origin or {}),
        key=key,
        access=access,
        priority=priority,
        created_at=now,
        updated_at=now,
        history=(HistoryEntry(at=now, event="created", state=JobState.QUEUED),),
    )
