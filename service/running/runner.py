"""Run one job, from wherever it stands to its end, under a lease.

Everything here can be repeated: a scheduler that takes a job over plans again, compares the plan's digest
with the recorded one, and goes on from what is recorded. What another scheduler's lease fences off raises
``LeaseLostError``, after which nothing more is touched.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import structlog

from service.access import confine
from service.jobs.leases import Lease, permit
from service.jobs.record import JobRecord, JobState
from service.jobs.transitions import (
    Cancelled,
    CommitStarted,
    Event,
    Failed,
    GivingUp,
    PlanningStarted,
    Restarted,
    ShardCompleted,
    Succeeded,
    UploadsOpened,
)
from service.planning.plan import Plan, PlanOptions
from service.planning.planner import Planned
from service.running.claim import Claim
from service.running.commit import Output, output_problems
from service.running.interruptible import Interruptible
from service.running.preparation import facts, plan_job
from service.running.publish import publish, published
from service.running.sidecars import OutputFile
from service.running.staging import carry_out
from service.running.work import Tools, Work
from service.watching import metrics
from workers import tracing
from workers.errors import (
    IllegalTransitionError,
    JobError,
    JobNotFoundError,
    JobStoreUnavailableError,
    LeaseLostError,
    MergemillError,
    PlanError,
    StoreUnavailableError,
    UploadNotFoundError,
    to_json,
)

MAX_ATTEMPTS = 5
"""How often a job is planned, because its scheduler ended or its uploads vanished, before it fails."""

MAX_OUTAGES = 3
"""How often a job goes on when the store was out of reach and nothing has been done since, before it fails."""

STALL_S = 5.0
"""How long a job that ends waits for one answer of the store, in seconds."""

log = structlog.get_logger(__name__)


class StoppedError(Exception):
    """This scheduler is shutting down; the job goes on elsewhere or later."""


class CancelledError(Exception):
    """Somebody asked for the job to end."""


class JobRunner:
    """One job under one lease. :meth:`run` returns when the job has ended or is not ours any more."""

    def __init__(self, record: JobRecord, lease: Lease, tools: Tools) -> None:
        self.record = record
        self.lease = lease
        self.tools = tools
        self.lost = threading.Event()
        self._calls = Interruptible(confine(tools.store, record.access, record.output), self._look)
        self.store = self._calls.store
        self._output = Output(self.store, record.output, record.id, partial(permit, tools.jobs, lease))
        self._checked = 0.0
        self._cancelled = record.cancel_requested
        self._is_ending = False

    def run(self) -> None:
        """Work until the job has ended, was cancelled, or belongs to somebody else."""
        job, origin = self.record.id, self.record.origin
        with (
            structlog.contextvars.bound_contextvars(job=job, **origin),
            tracing.span("job", {"mergemill.job": job}, origin.get("traceparent")) as span,
        ):
            self._run()
            span.set({"mergemill.state": str(self.record.state)})

    def _run(self) -> None:
        try:
            if self.record.giving_up is None:
                self._work()
            else:  # whoever had it before was at it
                self.check()
                self._end(Failed(self.record.giving_up))
        except LeaseLostError as error:
            metrics.LEASE_LOSSES.inc()
            log.warning("lease lost; leaving the job alone", reason=str(error))
        except StoppedError:
            log.info("scheduler stops; the job can be taken over")
        except CancelledError:
            self._end(Cancelled())
        except JobStoreUnavailableError as error:
            log.error("job state is out of reach; the job waits for it", error=str(error))
        except MergemillError as error:
            log.warning("job failed", error=type(error).__name__, detail=str(error))
            self._end(Failed(to_json(error)))
        except Exception as error:
            log.exception("job failed unexpectedly")
            self._end(Failed(to_json(error)))
        finally:
            self._release()

    @property
    def _options(self) -> PlanOptions:
        return PlanOptions.model_validate(self.record.options)

    def check(self) -> None:
        """Raise when this job should not go on here: lease lost, scheduler stopping, or cancelled."""
        if self.lost.is_set():
            raise LeaseLostError(f"{self.lease.job}: the lease {self.lease.token} is not in force")
        if self.tools.stopping.is_set():
            raise StoppedError
        if self.record.cancel_requested:  # before it was ours, or while we changed it
            raise CancelledError
        now = time.monotonic()
        if not self._cancelled and now - self._checked >= self.tools.settings.busy_poll_seconds:
            self._checked = now
            jobs, job = self.tools.jobs, self.record.id
            self._cancelled = jobs.version(job) != self.record.version and jobs.get(job).cancel_requested
        if self._cancelled:
            raise CancelledError

    def _look(self, waited_s: float) -> None:
        """Raise when a call to the store that has lasted so long should not be waited for."""
        if self.record.state == JobState.COMMITTING:
            return  # what is asked for is to happen, and to be known
        if not self._is_ending:
            self.check()
        elif self.lost.is_set():
            raise LeaseLostError(f"{self.lease.job}: the lease {self.lease.token} is not in force")
        elif waited_s > STALL_S:
            raise StoreUnavailableError(f"the store has not answered for {waited_s:.0f} seconds")

    def _work(self) -> None:
        self.check()
        if self.record.state in {JobState.QUEUED, JobState.PLANNING}:
            if (
                self.record.attempt >= MAX_ATTEMPTS
            ):  # whatever ends the scheduler that plans it would go on doing so
                raise JobError(f"planning began {self.record.attempt} times and never came to an end")
            self._apply(PlanningStarted())
        outages, done = 0, None
        while not self.record.state.is_terminal:
            try:
                self._go_on()
            except UploadNotFoundError as error:
                if self.record.attempt >= MAX_ATTEMPTS:
                    raise
                self._restart("upload", f"an upload is gone: {error}")
            except StoreUnavailableError as error:  # what was asked for may have happened all the same
                before, done = done, self._done()
                outages = outages + 1 if done == before else 1
                if outages > MAX_OUTAGES:
                    raise
                metrics.JOB_RETRIES.labels("store").inc()
                log.warning("the store is out of reach; trying again", error=str(error))
                self.tools.jobs.warn(self.lease, f"the store is out of reach; trying again: {error}")
                self._wait(self.tools.settings.outage_seconds * 2 ** (outages - 1))

    def _done(self) -> tuple[object, ...]:
        """How far the job has come: whether anything was done between two outages."""
        status = self.tools.jobs.status(self.record.id)
        return status.record.state, status.parts_done, status.surveys_done, status.record.completed_shards

    def _wait(self, seconds: float) -> None:
        """Wait, but no longer than the job is to go on here."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.check()
            self.tools.stopping.wait(min(left, self.tools.settings.poll_seconds))

    def _go_on(self) -> None:
        """Everything that is left to do, once."""
        self.check()
        if self.record.state == JobState.COMMITTING and self._is_committed():
            return
        planned = plan_job(self.record, self.store, self.tools, self.check)
        if self.record.state in {JobState.RUNNING, JobState.COMMITTING}:
            self._resume(planned)
        if self.record.state == JobState.PLANNING:
            self._open(planned)
        if self.record.state == JobState.RUNNING:
            for stage in planned.plan.stages:
                make = partial(self._make, planned, stage)
                carry_out(stage, planned.plan.digest, self._output, lambda: self.record, self._apply, make)
            self._make(planned)
            self._apply(CommitStarted())
        self._commit(planned)

    def _output_problems(self) -> list[str]:
        return output_problems(self.store, self.record.output, self._options.overwrite)

    def _claim_of(self, planned: Planned) -> Claim:
        shards = tuple(shard.name for each in planned.plan.whole for shard in each.shards)
        return Claim.of(
            self.record,
            facts(planned, self.tools.settings.gpu_memory_bytes),
            planned.recipe.seed,
            planned.pins,
            shards,
        )

    def _open(self, planned: Planned) -> None:
        self._apply(facts(planned, self.tools.settings.gpu_memory_bytes))
        claim = self._claim_of(planned)
        known = self._claim(claim)
        if problems := self._output_problems():  # another job may have finished here while this one planned
            raise PlanError(*problems)
        self._apply(UploadsOpened(self._output.open_uploads(planned.plan, claim, known)))

    def _resume(self, planned: Planned) -> None:
        """Go on with recorded uploads and parts, or start over when they are no use any more."""
        log.info("resuming", state=str(self.record.state))
        if planned.plan.digest != self.record.plan_digest:
            self._restart("plan", "planning again gave another plan: an input or Mergemill changed")
        else:
            self._claim(self._claim_of(planned))  # nobody else's by now, if it was lost

    def _claim(self, claim: Claim) -> dict[str, str]:
        """Claim the output in Redis and beside it; the uploads that an earlier claim of ours recorded."""
        self.tools.jobs.claim_output(self.lease, self.record.output)
        name_of = partial(self.tools.jobs.name, self.record.id)
        return self._output.claim(claim, self._is_over, name_of)

    def _restart(self, cause: str, reason: str) -> None:
        metrics.JOB_RETRIES.labels(cause).inc()
        log.warning("starting over", reason=reason)
        self._output.give_up()
        self._apply(Restarted(reason))

    def _make(self, planned: Planned, plan: Plan | None = None) -> None:
        """Make what is missing of the output's plan, or of an earlier merge's."""
        Work(self.record, self.lease, self.tools, self._output, planned, self.check, plan).run()
        self.check()

    @tracing.traced("commit")
    def _commit(self, planned: Planned) -> None:
        plan = planned.plan
        results = self.tools.jobs.parts(self.record.id)
        is_begun = any(shard.name in self.record.completed_shards for shard in plan.shards)
        if self._options.overwrite and not is_begun:
            self._output.make_room({shard.name for shard in plan.shards})
        for shard in plan.shards:
            if shard.name not in self.record.completed_shards:
                self._output.complete(shard, self.record.uploads, plan.digest)
                self._apply(ShardCompleted(shard.name))
        self._succeed(publish(planned, results, self._output, self._options.overwrite))

    def _is_committed(self) -> bool:
        """Whether the index is written, and only this had not been recorded: what is left is then done.

        No input is needed any more, and none may undo the commit.
        """
        digest = self.record.plan_digest
        if digest is None or set(self.record.uploads) - set(self.record.completed_shards):
            return False
        files = published(self._output, digest)
        if files is not None:
            self._succeed(files)
        return files is not None

    def _succeed(self, files: Iterable[OutputFile]) -> None:
        """Clear up and report. The output stays claimed in Redis until nothing of it can be done again."""
        self._output.clear(self.record.uploads)
        summary = {"files": [{"name": f.name, "size": f.size, "digest": f.digest} for f in files]}
        self._apply(Succeeded(summary))
        log.info("job succeeded", output=self.record.output, bytes=self.record.bytes_total)

    def _end(self, event: Failed | Cancelled) -> None:
        """Give the output up and record why; the uploads are aborted before anybody is told.

        Unless the store stalls: what is left there is then for :mod:`service.running.sweeper`.
        """
        self._is_ending = True
        try:
            if isinstance(event, Failed) and self.record.uploads:
                self._apply(GivingUp(event.error))
            left = self._give_up()
            self.record = self.tools.jobs.get(self.record.id)  # cancelled while it was queued, perhaps
            if self.record.state.is_terminal:
                return
            if left is not None and isinstance(event, Failed):
                detail = f"{event.error['detail']} ({self.record.output} could not be cleaned up: {left})"
                event = replace(event, error={**event.error, "detail": detail})
            self._apply(event if left is None else replace(event, left=left))
        except LeaseLostError as error:
            metrics.LEASE_LOSSES.inc()
            log.warning("lease lost at the end; leaving the job alone", reason=str(error))
        except JobStoreUnavailableError as error:
            log.error("job state is out of reach; the job waits for it", error=str(error))

    def _give_up(self) -> str | None:
        """Leave nothing behind, unless the job had succeeded after all; why something had to be left."""
        settled = self._calls.settle(STALL_S)
        try:
            if self.record.state == JobState.COMMITTING and self._is_committed():
                return None
            self._output.give_up()
            self.tools.jobs.release_output(self.lease, self.record.output)
        except (LeaseLostError, JobStoreUnavailableError):
            raise
        except MergemillError as error:
            log.error("could not clean up the output", error=type(error).__name__, detail=str(error))
            return str(error)
        return None if settled else "the store has not answered to what was asked of it before"

    def _release(self) -> None:
        try:
            self.tools.jobs.release(self.lease)
        except JobStoreUnavailableError as error:
            log.warning("could not release the lease; it will expire", reason=str(error))

    def _apply(self, event: Event) -> None:
        try:
            self.record = self.tools.jobs.apply(self.record.id, event, self.lease.token)
        except IllegalTransitionError:
            self.record = self.tools.jobs.get(self.record.id)
            if self.record.cancel_requested:  # since we looked
                raise CancelledError from None
            raise
        if self.record.state.is_terminal:
            metrics.job_ended(self.record)

    def _is_over(self, job: str) -> bool:
        try:
            return self.tools.jobs.get(job).state.is_terminal
        except JobNotFoundError:
            return False
