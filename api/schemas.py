"""What goes over the wire: requests and answers of ``/v1``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from service.jobs.pages import JobStatus
from service.jobs.progress import Progress
from service.jobs.record import JobState


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Output = Annotated[str, Field(min_length=1, max_length=2048)]
Priority = Annotated[int, Field(ge=-100, le=100)]


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


class RecipeQuery(OptionsBody):
    """What goes beside a YAML body, as query parameters."""

    output: Output | None = None
    """With a YAML body: where the checkpoint goes, `s3://bucket/prefix` or `file:///directory`."""

    priority: Priority | None = None
    """With a YAML body: which jobs are begun first; above 0 it takes an admin's key."""

    @property
    def options(self) -> OptionsBody:
        """The options alone."""
        return OptionsBody(**{name: getattr(self, name) for name in OptionsBody.model_fields})


class WebhookBody(_Model):
    """Who is to be told about a merge (Standard Webhooks)."""

    url: str
    """Where to POST to: https, at a public address, unless the service allows others."""
    events: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the events to tell, `progress` excepted; `succeeded`, `failed` and `cancelled` by default."""
    secret: SecretStr | None = None
    """What to sign with: `whsec_` and 24 to 64 random bytes in base64. It is never shown again."""


class MergeRequest(_Model):
    """A merge to run."""

    recipe: dict[str, Any] | list[dict[str, Any]]
    """mergekit's YAML, as JSON; of several documents a list of them, or `{"documents": [...]}`."""
    output: Output
    """Where the checkpoint goes: `s3://bucket/prefix` or `file:///directory`."""
    options: OptionsBody = OptionsBody()
    """How to run it."""
    webhook: WebhookBody | None = None
    """Who is to be told about it."""
    priority: Priority = 0
    """Jobs of higher priority are begun first; above 0 it takes an admin's key."""


class PlanRequest(_Model):
    """A merge to plan and price, without running it."""

    recipe: dict[str, Any] | list[dict[str, Any]]
    """mergekit's YAML, as JSON; of several documents a list of them, or `{"documents": [...]}`."""
    output: Output | None = None
    """Where the checkpoint would go; when given, it must not overlap an input, nor hold a checkpoint already."""
    options: OptionsBody = OptionsBody()
    """How it would run."""


class PriceInfo(_Model):
    """What a merge will cost, before it runs."""

    bytes_read: int
    """Input bytes fetched at most, every pass of the surveys included; passes that turn out needless fetch nothing."""
    bytes_written: int
    """Output bytes of all shards."""
    bytes_copied: int
    """Of these, bytes in parts that only copy: a store can move them by itself."""
    input_bytes: int
    """Bytes of the input tensors, counted once."""
    requests: int
    """Ranged reads and part uploads."""
    shards: int
    """Output files with weights."""
    parts: int
    """Part tasks."""
    survey_tasks: int
    """Survey tasks over all passes, none of them left out."""
    surveyed_tensors: int
    """Tensors that are read more than once: because no task can hold them, or as part of the whole model's survey."""
    most_reads: int
    """How often the most often read byte is read, when no pass of a survey turns out needless."""
    peak_bytes: int
    """Peak memory of a worker process: the baseline that it has before the first byte (512 MiB unless the service sets
    another), workspace and descriptions of tasks, and `arena_bytes`. What each task reserves on the cluster."""
    arena_bytes: int
    """The part of it that holds tensors: room for the task that holds most, and, as far as the budget goes, for as big
    a one that is read meanwhile and an output that is written."""
    gpu_bytes: int
    """Peak device memory of a worker; 0 when the service computes on CPUs, or there is nothing to compute."""
    worst: str
    """The tensor, or the first of the tensors, of the task that holds most: what a smaller budget has to split."""


class ShardInfo(_Model):
    """An output file with weights."""

    name: str
    """File name."""
    size: int
    """Length in bytes."""
    parts: int
    """In how many parts it is made."""


class PlanInfo(_Model):
    """A merge that would work, and what it costs."""

    digest: str
    """SHA-256 that two plans share only when they make the same bytes of the same parts."""
    semantics_version: int
    """Version of the mathematics."""
    price: PriceInfo
    """What it costs."""
    shards: tuple[ShardInfo, ...]
    """The output files with weights."""
    tensors: int
    """Tensors of the output."""
    total_size: int
    """Bytes of all tensors."""
    notices: tuple[str, ...]
    """What the planner wants you to know."""


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
    version: int
    """Grows by one with every change of the job, but for its progress."""
    recipe: dict[str, Any]
    """What was asked for."""
    output: str
    """Where the checkpoint goes."""
    options: dict[str, Any]
    """How it runs."""
    priority: int
    """Jobs of higher priority are begun first."""
    key: str | None
    """Id of the API key that it was submitted with; null where no key was needed."""
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
    """The jobs, each as it is when asked for alone; all of one moment."""
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


class Liveness(_Model):
    """This process answers."""

    status: Literal["ok"] = "ok"
    """Nothing else is ever said."""


class Check(_Model):
    """What is known of one dependency."""

    state: Literal["ok", "missing", "unknown", "unused"]
    """`unused`: nothing is configured that could be asked."""
    age_seconds: float | None = None
    """How long ago that was found out."""
    detail: str | None = None
    """What is wrong, or what there is."""


class Readiness(_Model):
    """Jobs can be accepted."""

    status: Literal["ready"] = "ready"
    """When it is not ready the answer is a problem, with what is `missing`."""
    missing: dict[str, str] = {}
    """What is out of reach, and why: nothing."""
    checks: dict[str, Check]
    """What is known of `redis`, `store` and `compute`. Without `compute` jobs are accepted, and wait."""
    warnings: tuple[str, ...]
    """What about the deployment could lose jobs."""


class Problem(_Model):
    """Why a request was not done (RFC 9457)."""

    type: str
    """`urn:mergemill:error:` and the error's name, or `about:blank`."""
    title: str
    """The kind of problem, in a few words."""
    status: int
    """The HTTP status."""
    detail: str
    """What is wrong here, and what to do about it."""
    errors: tuple[str, ...] | None = None
    """One sentence for each thing that is wrong, where there may be several; else left out."""
    missing: dict[str, str] | None = None
    """What a service that is not ready cannot reach, and why; else left out."""
    checks: dict[str, Check] | None = None
    """What is known of each dependency, where that was asked; else left out."""
    request_id: str | None = None
    """The request's, as in `X-Request-Id`: the service's logs name it."""


class MethodInfo(_Model):
    """A merge method."""

    name: str
    """Its name in a recipe."""
    summary: str
    """One sentence."""
    paper: str
    """Where it is defined."""
    formula: str
    """What it computes, as markdown."""
    base: str
    """Whether a base model is `required`, `optional`, the `first_model`, or `none` of its business."""
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
    most_reads: int
    """How often it reads a tensor that is split, at most, under its defaults."""
    whole_bytes_per_element: int
    """Workspace bytes for each element where its defaults keep a tensor whole; 0 where they do not."""
    workspace_bytes: int
    """Workspace of a task, in bytes, beside its output (`part_bytes` at most, unless a tensor is kept whole), as much
    of each input, and what `whole_bytes_per_element` says. With `workspace_bytes_per_input` for each input, and the
    worker's baseline, that is the peak which a plan's price tells."""
    workspace_bytes_per_input: int
    """And for each input, in bytes."""
    statistic: str | None
    """The key under which each model's entry names a checkpoint beside it: `fisher` or `gram`; null is none."""


def job_of(status: JobStatus, base: str) -> Job:
    """A job as the outside sees it; ``base`` is the URL path of the merges."""
    record = status.record
    here = f"{base}/{record.id}"
    return Job(
        id=record.id,
        state=record.state,
        version=record.version,
        recipe=record.recipe,
        output=record.output,
        options=record.options,
        priority=record.priority,
        key=record.key,
        created_at=_time(record.created_at),
        updated_at=_time(record.updated_at),
        cancel_requested=record.cancel_requested,
        progress=status.progress,
        price=record.price,
        notices=record.notices,
        error=record.error,
        history=tuple(
            HistoryItem(at=_time(entry.at), event=entry.event, state=entry.state, detail=entry.detail)
            for entry in record.history
        ),
        links={
            "self": here,
            "cancel": f"{here}/cancel",
            "events": f"{here}/events",
            "deliveries": f"{here}/deliveries",
            "files": f"{here}/files",
        },
    )


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
