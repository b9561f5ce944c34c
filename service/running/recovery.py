"""Make a job again that Redis has lost, from what lies beside its output.

The claim says what the job is and which uploads it has, the progress objects which of their parts are finished,
and the store which shards are. What comes of it is the record that the job had, or an earlier one of the same job, from
which a scheduler goes on as it would have.

The claim is no authority: whoever can write to the output can write one. So where the job may read and write is
what the key allows that it is recovered for, and its priority, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from service.access import grant
from service.jobs.record import HistoryEntry, JobRecord, created_at_ms
from service.jobs.recoverystore import RecoveryStore
from service.jobs.transitions import CommitStarted, PlanningStarted, ShardCompleted, UploadsOpened, advance
from service.keys import ANYBODY, ApiKey
from service.planning.plan import PlanOptions
from service.recipe import Graph, parse_documents
from service.running.claim import Claim, read_claim
from service.running.commit import Output, for_ever
from service.running.progress import saved_parts
from service.running.publish import published
from service.settings import Settings
from workers.errors import (
    DamagedClaimError,
    JobNotFoundError,
    NothingToRecoverError,
    RecipeError,
)
from workers.store.base import ObjectStore
from workers.store.uris import join, normalise
from workers.task import PartResult

RECOVERED = "recovered"
"""What the history calls it."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What came of recovering."""

    record: JobRecord
    """The job."""
    was_lost: bool
    """Whether it was made again; else it was there, and nothing was done."""
    parts: int = 0
    """How many of its parts are finished."""


def recover(
    output: str, settings: Settings, store: ObjectStore, jobs: RecoveryStore, whose: ApiKey | None, now: float
) -> Recovery:
    """Make the job again that has claimed an output, unless Redis knows it.

    Again, or twice at once, is no error. It must be sure that no scheduler of another Redis runs the job.

    :param whose: the key that it is to belong to.
    :raises NothingToRecoverError: there is no claim, or nobody whose job it could be.
    :raises DamagedClaimError: the claim cannot be read.
    :raises OutputConflictError: another job has the output meanwhile.
    :raises ForbiddenError: the key does not allow the job's inputs or output.
    :raises StoreError: the store does not tell.
    """
    uri = normalise(output)
    claim = read_claim(store, uri)
    if claim is None:
        raise NothingToRecoverError(_nothing_at(store, uri))
    known = _known(jobs, claim.job)
    if known is not None:
        return known
    if whose is None:
        whom = f"the key {claim.key}" if claim.key else "no key"
        raise NothingToRecoverError(
            f"{uri}: say with --key ID whose job {claim.job} is to be, and what it may read and write; "
            f"its claim says that it was submitted with {whom}"
        )
    record, parts = _record(claim, uri, settings, store, whose, now)
    if not jobs.restore(record, parts):
        return _known(jobs, claim.job) or Recovery(record, False)
    return Recovery(record, True, len(parts))


def _known(jobs: RecoveryStore, job: str) -> Recovery | None:
    try:
        status = jobs.status(job)
    except JobNotFoundError:
        return None
    return Recovery(status.record, False, status.parts_done)


def _nothing_at(store: ObjectStore, uri: str) -> str:
    there = Output(store, uri, job="", guard=for_ever).existing()
    if there is None:
        return f"{uri} is claimed by no job: what was lost had written nothing there, so submit it again"
    return f"{uri} is claimed by no job, and holds a checkpoint or what is left of one ({there})"


def _record(
    claim: Claim, uri: str, settings: Settings, store: ObjectStore, whose: ApiKey, now: float
) -> tuple[JobRecord, list[PartResult]]:
    """The record as far as it is sure, and the finished parts."""
    recipe, options = _checked(claim, uri)
    limits = settings.limits.with_own(whose.limits)
    created = created_at_ms(claim.job) / 1000 if claim.created_at is None else claim.created_at
    record = JobRecord(
        id=claim.job,
        recipe=claim.recipe,
        output=uri,
        options=options.model_dump(mode="json"),
        origin=claim.origin,
        key=None if whose is ANYBODY else whose.id,
        access=grant(whose, recipe.places, uri, settings.model_roots, limits),
        priority=claim.priority if whose.is_admin else min(0, claim.priority),
        created_at=created,
        updated_at=now,
        history=(HistoryEntry(at=created, event="created", state="queued"),),
    )
    parts: list[PartResult] = []
    if claim.planned is not None and set(claim.uploads) == set(claim.shards):
        for event in (PlanningStarted(), claim.planned, UploadsOpened(claim.uploads)):
            record = advance(record, event, now)
        parts = saved_parts(store, uri, claim.job, claim.plan_digest, claim.uploads)
        output = Output(store, uri, claim.job, for_ever)
        completed, is_committed = _completed(claim, output)
        if is_committed or (completed and len(parts) == claim.planned.parts_total):
            record = advance(record, CommitStarted(), now)
            for shard in completed:
                record = advance(record, ShardCompleted(shard), now)
    entry = HistoryEntry(
        at=record.updated_at,
        event=RECOVERED,
        state=record.state,
        detail=f"from the claim at its output, with {len(parts)} finished parts",
    )
    return record.model_copy(update={"history": (*record.history, entry)}), parts


def _checked(claim: Claim, uri: str) -> tuple[Graph, PlanOptions]:
    try:
        return parse_documents(claim.recipe), PlanOptions.model_validate(claim.options)
    except (RecipeError, ValidationError) as error:
        raise DamagedClaimError(
            f"the claim of {claim.job} at {uri} is none that a job can go on from: {error}"
        ) from error


def _completed(claim: Claim, output: Output) -> tuple[list[str], bool]:
    """The shards whose uploads have ended in what the plan makes, and whether the index is written.

    If it is, what tells who made a file of a directory may be cleared away already.
    """
    ended = []
    for shard in claim.shards:
        uri = join(output.uri, shard)
        if all(upload.id != claim.uploads[shard] for upload in output.store.list_uploads(uri)):
            ended.append(shard)
    if len(ended) == len(claim.shards) and published(output, claim.plan_digest) is not None:
        return ended, True
    made = [
        shard for shard in ended if output.made_by(join(output.uri, shard), claim.plan_digest) is not None
    ]
    return made, False
