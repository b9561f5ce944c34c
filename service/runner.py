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
from typing import Any

import structlog

from service import metrics
from service.access import confine, size_problems
from service.commit import Output, output_problems
from service.driver import Capacity
from service.jobrecord import JobRecord, JobState
from service.jobs import (
    Cancelled,
    CommitStarted,
    Event,
    Failed,
    PlanningStarted,
    Restarted,
    ShardCompleted,
    Succeeded,
    UploadsOpened,
)
from service.jobs import Planned as PlanRecorded
from service.jobstore import Lease
from service.plan import PlanOptions, plan_summary
from service.planning import Planned, examine
from service.price import Price, needs
from service.publish import publish, published
from service.recipe import parse_recipe
from service.sidecars import OutputFile
from service.work import Tools, Work
from workers import tracing
from workers.errors import (
    FleetError,
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
"""How often a job goes on from what is recorded when the store was out of reach, before it fails."""

CLUSTER_WAIT_S = 180.0
"""How long a job waits for the compute cluster to come up, in seconds, before it fails."""

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
        self.store = confine(tools.store, record.access, record.output)
        self._output = Output(self.store, record.output, record.id, self._guard)
        self._checked = 0.0
        self._log = log

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
            self._work()
        except LeaseLostError as error:
            metrics.LEASE_LOSSES.inc()
            self._log.warning("lease lost; leaving the job alone", reason=str(error))
        except StoppedError:
            self._log.info("scheduler stops; the job can be taken over")
        except CancelledError:
            self._end(Cancelled())
        except JobStoreUnavailableError as error:
            self._log.error("job state is out of reach; the job waits for it", error=str(error))
        except MergemillError as error:
            self._log.warning("job failed", error=type(error).__name__, detail=str(error))
            self._end(Failed(to_json(error)))
        except Exception as error:  # noqa: BLE001 - a defect of ours must end the job visibly, not vanish with its thread
            self._log.exception("job failed unexpectedly")
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
        if now - self._checked >= self.tools.settings.busy_poll_seconds:
            self._checked = now
            jobs, job = self.tools.jobs, self.record.id
            if jobs.version(job) != self.record.version and jobs.get(job).cancel_requested:
                raise CancelledError

    def _work(self) -> None:
        if self.record.state in {JobState.QUEUED, JobState.PLANNING}:
            if (
                self.record.attempt >= MAX_ATTEMPTS
            ):  # whatever ends the scheduler that plans it would go on doing so
                raise JobError(f"planning began {self.record.attempt} times and never came to an end")
            self._apply(PlanningStarted())
        outages = 0
        while not self.record.state.is_terminal:
            try:
                self._go_on()
            except UploadNotFoundError as error:
                if self.record.attempt >= MAX_ATTEMPTS:
                    raise
                self._restart("upload", f"an upload is gone: {error}")
            except StoreUnavailableError as error:  # what was asked for may have happened all the same
                outages += 1
                if outages > MAX_OUTAGES:
                    raise
                metrics.JOB_RETRIES.labels("store").inc()
                self._log.warning("the store is out of reach; trying again", error=str(error))
                self.tools.jobs.warn(self.lease, f"the store is out of reach; trying again: {error}")
                self.tools.stopping.wait(self.tools.settings.poll_seconds)

    def _go_on(self) -> None:
        """Everything that is left to do, once."""
        self.check()
        if self.record.state == JobState.COMMITTING and self._is_committed():
            return
        planned = self._plan()
        if self.record.state in {JobState.RUNNING, JobState.COMMITTING}:
            self._resume(planned)
        if self.record.state == JobState.PLANNING:
            self._open(planned)
        if self.record.state == JobState.RUNNING:
            Work(self.record, self.lease, self.tools, self._output, planned, self.check).run()
            self.check()
            self._apply(CommitStarted())
        self._commit(planned)

    @tracing.traced("plan")
    def _plan(self) -> Planned:
        """Plan; in the planning state with everything that can be wrong about the output, too."""
        settings = self.tools.settings
        outcome = examine(
            parse_recipe(self.record.recipe),
            self._options,
            self.store,
            settings.model_roots,
            settings.worker_baseline_bytes,
            self.record.output,
        )
        if self.record.state != JobState.PLANNING:
            return outcome.result()  # the job waits for a store that is out of reach
        # As long as nothing is made, it had better say so at once.
        problems = [*outcome.problems, *outcome.away, *self._output_problems()]
        if outcome.price is not None:
            problems.extend(size_problems(self.record.access, outcome.price))
            problems.extend(self._capacity_problems(outcome.price, CLUSTER_WAIT_S if not problems else 0))
        if problems:
            raise PlanError(*problems)
        return outcome.result()

    def _output_problems(self) -> list[str]:
        return output_problems(self.store, self.record.output, self._options.overwrite)

    def _capacity_problems(self, price: Price, wait_s: float) -> list[str]:
        """Whether no node can take the biggest task; nothing, when the job fails anyhow and no cluster is up."""
        try:
            capacity = self._capacity(wait_s)
        except FleetError:
            if wait_s:
                raise
            return []
        wanted = needs(price, self.tools.settings.gpu_memory_bytes)
        problems = []
        if wanted.memory_bytes > capacity.max_node_memory_bytes:
            problems.append(
                f"the biggest task ({price.worst}) needs {wanted.memory_bytes} bytes of memory, and the largest node "
                f"of the cluster offers {capacity.max_node_memory_bytes}: lower worker_memory_bytes or add a larger one"
            )
        if wanted.gpus > 1:
            problems.append(
                f"a task needs up to {price.gpu_bytes} bytes of GPU memory, and each GPU has "
                f"{self.tools.settings.gpu_memory_bytes} (MERGEMILL_GPU_MEMORY_BYTES): use bigger ones, or set it to 0 "
                f"to compute on CPUs"
            )
        elif wanted.gpus > capacity.gpus:
            problems.append(
                f"the tasks compute on a GPU (MERGEMILL_GPU_MEMORY_BYTES is set), and the cluster offers "
                f"{capacity.gpus:g}: add a node with one, or set it to 0 to compute on CPUs"
            )
        return problems

    def _capacity(self, wait_s: float) -> Capacity:
        """What the cluster offers; a cancel or a stop does not wait for a cluster that is not up."""
        deadline = time.monotonic() + wait_s
        while True:
            self.check()
            try:
                return self.tools.driver.capacity(self.tools.settings.poll_seconds)
            except FleetError:
                if time.monotonic() > deadline:
                    raise

    def _document(self, planned: Planned) -> dict[str, Any]:
        """What the claim object says about the job."""
        pins = {c.uri: dict(c.pins) for c in (planned.inputs.reference, *planned.inputs.models)}
        recipe = planned.recipe
        return {
            "recipe": recipe.to_json(),
            "options": self.record.options,
            "seed": recipe.seed,
            "plan_digest": planned.plan.digest,
            "inputs": pins,
            "shards": [shard.name for shard in planned.plan.shards],
        }

    def _open(self, planned: Planned) -> None:
        plan = planned.plan
        passes = sum(survey.passes for survey in plan.surveys)
        price = plan_summary(plan, self.tools.settings.gpu_memory_bytes)["price"]
        self._apply(
            PlanRecorded(
                plan.digest,
                plan.semantics_version,
                price,
                plan.notices,
                plan.price.bytes_written,
                len(plan.parts),
                passes,
            )
        )
        document = self._document(planned)
        known = self._claim(document)
        if problems := self._output_problems():  # another job may have finished here while this one planned
            raise PlanError(*problems)
        self._apply(UploadsOpened(self._output.open_uploads(plan, document, known)))

    def _resume(self, planned: Planned) -> None:
        """Go on with recorded uploads and parts, or start over when they are no use any more."""
        self._log.info("resuming", state=str(self.record.state))
        if planned.plan.digest != self.record.plan_digest:
            self._restart("plan", "planning again gave another plan: an input or Mergemill changed")
        else:
            self._claim(self._document(planned))  # nobody else's by now, if it was lost

    def _claim(self, document: dict[str, Any]) -> dict[str, str]:
        """Claim the output in Redis and beside it; the uploads that an earlier claim of ours recorded."""
        self.tools.jobs.claim_output(self.lease, self.record.output)
        return self._output.claim(document, self._is_over)

    def _restart(self, cause: str, reason: str) -> None:
        metrics.JOB_RETRIES.labels(cause).inc()
        self._log.warning("starting over", reason=reason)
        self._output.give_up()
        self._apply(Restarted(reason))

    @tracing.traced("commit")
    def _commit(self, planned: Planned) -> None:
        plan = planned.plan
        results = self.tools.jobs.parts(self.record.id)
        if self._options.overwrite and not self.record.completed_shards:
            self._output.make_room()
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
        self._log.info("job succeeded", output=self.record.output, bytes=self.record.bytes_total)

    def _end(self, event: Event) -> None:
        """Give the output up and record why; the uploads are aborted before anybody is told."""
        try:
            left = self._give_up()
            if self.record.state.is_terminal:
                return
            if left is not None and isinstance(event, Failed):
                detail = f"{event.error['detail']} ({self.record.output} could not be cleaned up: {left})"
                event = replace(event, error={**event.error, "detail": detail})
            self._apply(event)
        except LeaseLostError as error:
            metrics.LEASE_LOSSES.inc()
            self._log.warning("lease lost at the end; leaving the job alone", reason=str(error))
        except JobStoreUnavailableError as error:
            self._log.error("job state is out of reach; the job waits for it", error=str(error))

    def _give_up(self) -> str | None:
        """Leave nothing behind, unless the job had succeeded after all; why something had to be left."""
        try:
            if self.record.state == JobState.COMMITTING and self._is_committed():
                return None
            self._output.give_up()
            self.tools.jobs.release_output(self.lease, self.record.output)
        except (LeaseLostError, JobStoreUnavailableError):
            raise
        except MergemillError as error:
            self._log.error("could not clean up the output", error=type(error).__name__, detail=str(error))
            return str(error)
        return None

    def _release(self) -> None:
        try:
            self.tools.jobs.release(self.lease)
        except JobStoreUnavailableError as error:
            self._log.warning("could not release the lease; it will expire", reason=str(error))

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

    def _guard(self) -> None:
        self.tools.jobs.renew(self.lease)

    def _is_over(self, job: str) -> bool:
        try:
            return self.tools.jobs.get(job).state.is_terminal
        except JobNotFoundError:
            return False
