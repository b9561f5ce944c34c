"""What goes over the wire: requests and answers of ``/v1``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from service.jobs import JobRecord, JobState
from service.jobpages import JobStatus


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OptionsBody(_Model):
    """How to run a merge; what is left out is the service's default."""

    shard_bytes: int | None = None
    """Most tensor bytes of one output file."""
    part_bytes: int | None = None
    """Output bytes of one unit of work."""
    whole_tensor_bytes: int | None = None
    """Output bytes up to which a tensor is surveyed and merged in one read."""
    worker_memory_bytes: int | None = None
    """Most memory of one worker process."""
    overwrite: bool | None = None
    """Replace a checkpoint that is already at the output."""
    allow_nonfinite: bool | None = None
    """Let NaN and Inf in the inputs through."""


class MergeRequest(_Model):
    """A merge to run."""

    recipe: dict[str, Any]
    """mergekit's YAML, as JSON."""
    output: str = Field(min_length=1, max_length=2048)
    """Where the checkpoint goes: `s3://bucket/prefix` or `file:///directory`."""
    options: OptionsBody = OptionsBody()
    """How to run it."""


class PlanRequest(_Model):
    """A merge to plan and price, without running it."""

    recipe: dict[str, Any]
    """mergekit's YAML, as JSON."""
    output: str | None = Field(default=None, min_length=1, max_length=2048)
    """Where the checkpoint would go; checked against the inputs when given."""
    options: OptionsBody = OptionsBody()
    """How it would run."""


class Progress(_Model):
    """How far a job is."""

    bytes_done: int
    """Output bytes in finished parts."""
    bytes_total: int
    """Output bytes of all parts."""
    bytes_read: int
    """Input bytes read so far."""
    parts_done: int
    """Finished parts."""
    parts_total: int
    """All parts."""
    surveys_done: int
    """Finished survey passes."""
    surveys_total: int
    """All survey passes."""


class HistoryItem(_Model):
    """One thing that happened to a job."""

    at: datetime
    """When."""
    event: str
    """What."""
    state: JobState
    """The state after it."""
    detail: str
    """A few words."""


class Job(_Model):
    """A merge job."""

    id: str
    """Its id."""
    state: JobState
    """Where it stands."""
    recipe: dict[str, Any]
    """What was asked for."""
    output: str
    """Where the checkpoint goes."""
    options: dict[str, Any]
    """How it runs."""
    created_at: datetime
    """When it was accepted."""
    updated_at: datetime
    """When it last changed."""
    cancel_requested: bool
    """Whether somebody asked for its end."""
    progress: Progress
    """How far it is."""
    price: dict[str, Any] | None
    """What it costs, once planned."""
    notices: tuple[str, ...]
    """What the planner wants you to know."""
    error: dict[str, Any] | None
    """Why it failed: `type`, `detail` and, where there are several, `problems`."""
    history: tuple[HistoryItem, ...]
    """What happened so far."""
    links: dict[str, str]
    """Related resources."""


class JobList(_Model):
    """A page of jobs, newest first."""

    jobs: tuple[Job, ...]
    """The jobs; progress counters are those of single jobs only and stand at the recorded totals here."""
    next_cursor: str | None
    """Pass it as `cursor` for the next page; null on the last one."""


class File(_Model):
    """A file of a merged checkpoint."""

    name: str
    """File name."""
    size: int
    """Length in bytes."""
    digest: str
    """`sha256:` of the bytes, or `sha256-tree-1mib:` for shards (see docs/rest.md)."""
    url: str
    """Where to download it: presigned, or served here with Range support."""


class FileList(_Model):
    """The files of a merged checkpoint."""

    files: tuple[File, ...]
    """All of them; the index last."""


class MethodInfo(_Model):
    """A merge method."""

    name: str
    """Its name in a recipe."""
    summary: str
    """One sentence."""
    paper: str
    """Where it is defined."""
    base: str
    """Whether it needs a base model."""
    min_models: int
    """Fewest models."""
    max_models: int | None
    """Most models; null is any number."""
    parameters: dict[str, Any]
    """JSON schema of the global parameters."""
    model_parameters: dict[str, Any]
    """JSON schema of each model's parameters, which may also be given globally."""
    profiles: dict[str, dict[str, Any]]
    """Defaults under the named profiles."""


def job_of(status: JobStatus, base: str) -> Job:
    """A job as the outside sees it; ``base`` is the URL path of the merges."""
    record = status.record
    return _job(
        record,
        Progress(
            bytes_done=status.bytes_done,
            bytes_total=record.bytes_total,
            bytes_read=status.bytes_read,
            parts_done=status.parts_done,
            parts_total=record.parts_total,
            surveys_done=status.surveys_done,
            surveys_total=record.surveys_total,
        ),
        base,
    )


def _job(record: JobRecord, progress: Progress, base: str) -> Job:
    here = f"{base}/{record.id}"
    return Job(
        id=record.id,
        state=record.state,
        recipe=record.recipe,
        output=record.output,
        options=record.options,
        created_at=_time(record.created_at),
        updated_at=_time(record.updated_at),
        cancel_requested=record.cancel_requested,
        progress=progress,
        price=record.price,
        notices=record.notices,
        error=record.error,
        history=tuple(
            HistoryItem(at=_time(entry.at), event=entry.event, state=entry.state, detail=entry.detail)
            for entry in record.history
        ),
        links={"self": here, "cancel": f"{here}/cancel", "files": f"{here}/files"},
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
