"""Short ways to get jobs into their states, for the tests of everything that has to do with jobs."""

from __future__ import annotations

import json

from service.jobs.record import JobRecord, JobState, new_job
from service.jobs.transitions import (
    Cancelled,
    CancelRequested,
    CommitStarted,
    Event,
    Failed,
    GivingUp,
    Planned,
    PlanningStarted,
    Restarted,
    ShardCompleted,
    Succeeded,
    UploadsOpened,
)
from workers.task import PartResult, TensorDigest

UPLOADS = {"model-00001-of-00002.safetensors": "upload-a", "model-00002-of-00002.safetensors": "upload-b"}
PLANNED = Planned("d" * 64, 1, {"parts": 3}, ("a notice",), 3000, 3, 2)
ERROR = {"type": "PlanError", "detail": "no such tensor", "problems": ["no such tensor"]}

SAMPLES: tuple[Event, ...] = (
    PlanningStarted(),
    PLANNED,
    UploadsOpened(UPLOADS),
    Restarted("another plan"),
    CommitStarted(),
    ShardCompleted(next(iter(UPLOADS))),
    Succeeded({"bytes": 3000}),
    GivingUp(ERROR),
    Failed(ERROR),
    CancelRequested(),
    Cancelled(),
)
"""One event of each kind."""

TO_RUNNING: tuple[Event, ...] = (PlanningStarted(), PLANNED, UploadsOpened(UPLOADS))
TO_COMMITTING: tuple[Event, ...] = (*TO_RUNNING, CommitStarted())
ALL_COMPLETE: tuple[Event, ...] = tuple(ShardCompleted(shard) for shard in UPLOADS)

PATHS: dict[JobState, tuple[Event, ...]] = {
    JobState.QUEUED: (),
    JobState.PLANNING: (PlanningStarted(), PLANNED),
    JobState.RUNNING: TO_RUNNING,
    JobState.COMMITTING: TO_COMMITTING,
    JobState.SUCCEEDED: (*TO_COMMITTING, *ALL_COMPLETE, Succeeded({"bytes": 3000})),
    JobState.FAILED: (PlanningStarted(), Failed(ERROR)),
    JobState.CANCELLED: (CancelRequested(),),
}
"""The events that lead a new job to each state."""


def fresh(now: float = 1000.0) -> JobRecord:
    """A queued job."""
    recipe = json.loads('{"merge_method": "ties", "models": [{"model": "s3://a/ü", "weight": 0.1}]}')
    return new_job(recipe, "s3://bucket/output", {"overwrite": False}, now)


def part(number: int, size: int = 1000) -> PartResult:
    """The result of a part."""
    digests = (TensorDigest("model.embed_tokens.weight", 0, ("ab" * 32,)),)
    name, seconds = f"{number:032x}", {"read": 0.1, "merge": 1 / 3}
    return PartResult(
        name, next(iter(UPLOADS)), number, size, f"etag-{number}", digests, 3 * size, {}, 1, seconds
    )
