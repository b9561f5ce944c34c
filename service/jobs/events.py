"""What is told about a job while it goes on: every change of its record, and its progress. Pure.

An event is written in the same step as the change that it tells of (see :mod:`service.jobs.eventscripts`), so none is
lost, and none is told of what did not happen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final

from service.jobs.pages import JobStatus
from service.jobs.progress import Progress
from service.jobs.record import JobRecord, JobState
from service.jobs.transitions import TRANSITIONS, event_name_of
from workers.errors import MalformedRequestError
from workers.task import JSONValue

PROGRESS: Final = "progress"
"""Name of the event that parts or surveys were finished; at most about one a second."""

WARNING: Final = "warning"
"""Name of the event that something went wrong, and the job goes on."""

CHANGES: Final = frozenset(
    {
        "created",
        "recovered",
        "succeeded",
        "failed",
        "cancelled",
        *(event_name_of(kind) for kind in TRANSITIONS),
    }
)
"""Names of the events that tell of a change of the record."""

_ID = re.compile(r"[0-9]{1,20}-[0-9]{1,20}")


@dataclass(frozen=True, slots=True)
class JobEvent:
    """One thing that happened to a job."""

    id: str
    """Where in the job's stream it is; empty for one that stands for a stream that is gone."""
    job: str
    """Id of the job."""
    event: str
    """``progress``, ``warning``, ``succeeded``, ``failed``, ``cancelled``, or the history's name for the change."""
    state: JobState
    """The state after it."""
    version: int
    """The record's version after it."""
    at: float
    """When, in Unix seconds."""
    detail: str
    """A few words for people."""
    progress: Progress
    """How far the job was then."""

    def to_json(self) -> dict[str, JSONValue]:
        """What is sent of it."""
        at = datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {
            "job": self.job,
            "event": self.event,
            "state": str(self.state),
            "version": self.version,
            "at": at,
            "detail": self.detail,
            "progress": asdict(self.progress),
        }


def telling(before: JobRecord | None, after: JobRecord) -> tuple[str, str, str]:
    """What the stream is told of a change: the event's name, its entry, and the record's totals.

    No name: nothing has changed. An event that ends a job is named for how it ended.
    """
    last = after.history[-1]
    changed = before is None or after.version != before.version
    name = str(after.state) if after.state.is_terminal else last.event
    entry = json.dumps({"at": last.at, "detail": last.detail})
    totals = f"{after.bytes_total} {after.parts_total} {after.surveys_total}"
    return name if changed else "", entry, totals


def read_event(job: str, id: str, fields: Mapping[str, str]) -> JobEvent:  # noqa: A002 - what Redis calls it
    """An entry of a job's stream."""
    entry = json.loads(fields["entry"] or "{}")
    bytes_total, parts_total, surveys_total = map(int, fields["totals"].split())
    return JobEvent(
        id=id,
        job=job,
        event=fields["event"],
        state=JobState(fields["state"]),
        version=int(fields["version"]),
        at=float(entry.get("at", int(id.partition("-")[0]) / 1000)),
        detail=str(entry.get("detail", "")),
        progress=Progress(
            bytes_done=int(fields["bytes_done"]),
            bytes_total=bytes_total,
            bytes_read=int(fields["bytes_read"]),
            parts_done=int(fields["parts"]),
            parts_total=parts_total,
            surveys_done=int(fields["surveys"]),
            surveys_total=surveys_total,
        ),
    )


def last_event(status: JobStatus) -> JobEvent:
    """How a job stands, for one whose stream does not tell: it is older than streams, or its stream was swept."""
    record = status.record
    name, _, _ = telling(None, record)
    return JobEvent(
        id="",
        job=record.id,
        event=name,
        state=record.state,
        version=record.version,
        at=record.updated_at,
        detail=record.history[-1].detail,
        progress=status.progress,
    )


def read_id(text: str) -> str:
    """The id of an event, as a client says which one it had last.

    :raises MalformedRequestError: it is not one.
    """
    if not _ID.fullmatch(text) or any(int(number) >= 2**64 for number in text.split("-")):
        raise MalformedRequestError("the last event's id is not one that a stream gave out")
    return text
