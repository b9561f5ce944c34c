"""The one table of what may happen to a job. Pure: no Redis, no clock, no network.

::

    queued ──> planning ──> running ──> committing ──> succeeded
                  ▲            │            │
                  └────────────┴────────────┘  restarted: another plan, so everything begins again

    failed: from any of these but succeeded; cancelled: from queued, planning and running

A record is changed by :func:`advance` and by nothing else; the job store writes the result with a
compare-and-set on ``version``, so of two contradictory events (a cancel and the commit) exactly one happens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from service.jobs.record import HISTORY_LIMIT, HistoryEntry, JobRecord, JobState
from service.planning.checkpoint import is_staged
from workers.errors import IllegalTransitionError, from_json
from workers.task import JSONValue

DETAIL_CHARS = 500
"""Longest detail of a history entry, in characters."""


@dataclass(frozen=True, slots=True)
class PlanningStarted:
    """A scheduler begins to plan: for the first time, or because the one before it did not finish."""


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan is made and priced."""

    plan_digest: str
    """SHA-256 of the plan's canonical JSON."""
    semantics_version: int
    """Version of the mathematics."""
    price: Mapping[str, JSONValue]
    """What it costs."""
    notices: tuple[str, ...]
    """What the user should know."""
    bytes_total: int
    """Output bytes that the parts make together."""
    parts_total: int
    """Number of parts."""
    surveys_total: int = 0
    """Number of survey passes."""


@dataclass(frozen=True, slots=True)
class UploadsOpened:
    """Every shard has its multipart upload: parts may be made."""

    uploads: Mapping[str, str]
    """Upload id by shard name."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """Nothing made so far can be used: planning again gave another plan, or an upload is gone.

    Planning begins again, and counts as an attempt. Whoever sends it has aborted the uploads and deleted
    the completed shards.
    """

    reason: str
    """Why, for people."""


@dataclass(frozen=True, slots=True)
class CommitStarted:
    """All parts are there; from here on the job can no longer be cancelled."""


@dataclass(frozen=True, slots=True)
class ShardCompleted:
    """A shard's upload has been completed: the output's when it is committed, an earlier merge's before."""

    shard: str
    """The shard's name."""


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The index, which is the commit marker, is written."""

    summary: Mapping[str, JSONValue] = field(default_factory=dict)
    """What to report."""


@dataclass(frozen=True, slots=True)
class GivingUp:
    """The job cannot be done, and its uploads are about to be aborted: who owns it from now on goes on with that.

    Otherwise whoever takes it over in between would find an upload gone, and begin everything again.
    """

    error: Mapping[str, JSONValue]
    """Why, as :func:`workers.errors.to_json` puts it."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The job cannot be done; its uploads have been aborted."""

    error: Mapping[str, JSONValue]
    """Why, as :func:`workers.errors.to_json` puts it."""
    left: str = ""
    """Why its output could not be cleared away yet; nothing when it was."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Somebody wants the job to end. The one event that needs no lease."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The scheduler has ended the job on request; its uploads have been aborted."""

    left: str = ""
    """Why its output could not be cleared away yet; nothing when it was."""


Event = (
    PlanningStarted
    | Planned
    | UploadsOpened
    | Restarted
    | CommitStarted
    | ShardCompleted
    | Succeeded
    | GivingUp
    | Failed
    | CancelRequested
    | Cancelled
)

_S = JobState
TRANSITIONS: Mapping[type[Event], Mapping[JobState, JobState]] = {
    PlanningStarted: {_S.QUEUED: _S.PLANNING, _S.PLANNING: _S.PLANNING},
    Planned: {_S.PLANNING: _S.PLANNING},
    UploadsOpened: {_S.PLANNING: _S.RUNNING},
    Restarted: {_S.RUNNING: _S.PLANNING, _S.COMMITTING: _S.PLANNING},
    CommitStarted: {_S.RUNNING: _S.COMMITTING},
    ShardCompleted: {_S.RUNNING: _S.RUNNING, _S.COMMITTING: _S.COMMITTING},
    Succeeded: {_S.COMMITTING: _S.SUCCEEDED},
    GivingUp: {_S.RUNNING: _S.RUNNING, _S.COMMITTING: _S.COMMITTING},
    Failed: {state: _S.FAILED for state in _S if not state.is_terminal},
    CancelRequested: {
        _S.QUEUED: _S.CANCELLED,
        _S.PLANNING: _S.PLANNING,
        _S.RUNNING: _S.RUNNING,
        _S.CANCELLED: _S.CANCELLED,
    },
    Cancelled: {_S.PLANNING: _S.CANCELLED, _S.RUNNING: _S.CANCELLED},
}
"""Where each event leads from each state; what is not here, or is named by :func:`_refusal`, is illegal."""

_STANDS = {
    _S.COMMITTING: "is committing its output",
    _S.SUCCEEDED: "already succeeded",
    _S.FAILED: "already failed",
}

_NO_PLAN: Mapping[str, object] = {
    "plan_digest": None,
    "semantics_version": None,
    "price": None,
    "notices": (),
    "bytes_total": 0,
    "parts_total": 0,
    "surveys_total": 0,
    "completed_shards": (),
}


def advance(record: JobRecord, event: Event, now: float) -> JobRecord:
    """The record after ``event`` at ``now`` (Unix seconds); the same object when the event changes nothing.

    A cancel asked for twice, a shard completed twice and another reason to give up change nothing.

    :raises IllegalTransitionError: the job's state does not allow it.
    """
    target = TRANSITIONS[type(event)].get(record.state)
    if target is None:
        raise _illegal(record, event, f"the job is {record.state}")
    if refusal := _refusal(record, event):
        raise _illegal(record, event, refusal)
    if _is_known(record, event):
        return record
    now = max(now, record.updated_at)  # schedulers' clocks differ; a record's time does not run backwards
    attempt = record.attempt + isinstance(event, PlanningStarted | Restarted)
    entry = HistoryEntry(at=now, event=event_name(event), state=target, detail=_detail(event, attempt))
    history = record.history
    if len(history) >= HISTORY_LIMIT:
        history = (history[0], *history[2 - HISTORY_LIMIT :])
    return record.model_copy(
        update={
            "state": target,
            "version": record.version + 1,
            "updated_at": now,
            "attempt": attempt,
            "history": (*history, entry),
            **_changes(record, event),
        }
    )


def event_name(event: Event) -> str:
    """The event's name in snake case."""
    return event_name_of(type(event))


def event_name_of(kind: type[Event]) -> str:
    """The name of a kind of event in snake case."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


def _refusal(record: JobRecord, event: Event) -> str | None:
    """Why the record, though its state would allow the event, does not."""
    match event:
        case UploadsOpened(uploads) if record.plan_digest is None or not uploads:
            return "there is no plan yet" if uploads else "no upload was opened"
        case CommitStarted() if record.cancel_requested:
            return "somebody asked to cancel it first"
        case ShardCompleted(shard) if shard not in record.uploads or (
            record.state == JobState.RUNNING and not is_staged(shard)
        ):
            return f"it has no shard {shard}" + (" to complete yet" if shard in record.uploads else "")
        case Succeeded() if missing := sorted(set(record.uploads) - set(record.completed_shards)):
            return f"{len(missing)} of its shards are not complete, {missing[0]} among them"
        case Cancelled() if not record.cancel_requested:
            return "nobody asked to cancel it"
    return None


def _is_known(record: JobRecord, event: Event) -> bool:
    """Whether the record already says so."""
    match event:
        case CancelRequested():
            return record.cancel_requested
        case ShardCompleted(shard):
            return shard in record.completed_shards
        case GivingUp():
            return record.giving_up is not None
    return False


def _changes(record: JobRecord, event: Event) -> Mapping[str, object]:
    """What the event changes, beside what every event does."""
    changes: Mapping[str, object] = {}
    match event:
        case PlanningStarted() | Restarted():
            changes = {**_NO_PLAN, "uploads": {}}
        case Planned():
            facts = {name: getattr(event, name) for name in Planned.__dataclass_fields__}
            changes = {**facts, "price": dict(event.price)}
        case UploadsOpened(uploads):
            changes = {"uploads": dict(uploads)}
        case ShardCompleted(shard):
            changes = {"completed_shards": (*record.completed_shards, shard)}
        case Succeeded(summary):
            changes = {"summary": dict(summary)}
        case GivingUp(error):
            changes = {"giving_up": dict(error)}
        case Failed(error):
            changes = {"error": dict(error)}
        case CancelRequested():
            changes = {"cancel_requested": True}
    return changes


def _detail(event: Event, attempt: int) -> str:
    """A few words about the event for the history."""
    match event:
        case PlanningStarted():
            detail = f"attempt {attempt}"
        case Planned(plan_digest):
            detail = f"plan {plan_digest[:12]}"
        case UploadsOpened(uploads):
            detail = f"{len(uploads)} shards"
        case Restarted(reason):
            detail = reason
        case ShardCompleted(shard):
            detail = shard
        case GivingUp(error) | Failed(error):
            detail = str(from_json(dict(error)))
        case Cancelled(left) if left:
            detail = f"its output could not be cleared away yet: {left}"
        case _:
            detail = ""
    return detail[:DETAIL_CHARS]


def _illegal(record: JobRecord, event: Event, why: str) -> IllegalTransitionError:
    """The error for people, with the record's history as a note for logs."""
    history = "; ".join(
        f"{entry.at:.3f} {entry.event} -> {entry.state}{f' ({entry.detail})' if entry.detail else ''}"
        for entry in record.history
    )
    if isinstance(event, CancelRequested):
        stands = _STANDS.get(record.state, f"is {record.state}")
        error = IllegalTransitionError(f"{record.id} {stands}; it cannot be cancelled any more")
    else:
        error = IllegalTransitionError(f"{record.id}: {event_name(event)} is not possible, {why}")
    error.add_note(f"History: {history}")
    return error
