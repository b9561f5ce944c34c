"""The parts of one job: surveys first where they are needed, everything else at once, finished work recorded once."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import filterfalse
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

import structlog
from pydantic import SecretStr

from service.cluster.driver import Driver, TaskRequest
from service.jobs.jobstore import JobStore, Lease
from service.jobs.record import JobRecord
from service.planning.known_digests import KnownDigests
from service.planning.labels import label_of, part_label, suspects
from service.planning.plan import Plan
from service.planning.planner import Planned
from service.planning.price import needs
from service.running.commit import Output
from service.running.progress import Progress
from service.settings import Settings
from service.watching import metrics
from workers import tracing
from workers.binding import bind
from workers.errors import FleetError, MergemillError, StoreError
from workers.methods.base import Summary, SurveyPass
from workers.methods.survey import Tally, conclude_pass, next_pass
from workers.ranges import Arrangement
from workers.store.base import ObjectStore
from workers.store.settings import StoreSettings
from workers.task import (
    PART,
    PART_RESULT,
    SURVEY_TASK,
    Arithmetic,
    Facts,
    JSONValue,
    Part,
    PartResult,
    Survey,
    SurveyTask,
    refs_of,
)

TASKS_ENTRY: Final = "workers.entry:tasks"
"""What workers call; not imported here, where it would bring torch and numba with it."""

_T = TypeVar("_T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Tools:
    """What every job of a scheduler shares."""

    settings: Settings
    """The deployment's settings."""
    jobs: JobStore
    """Job state."""
    store: ObjectStore
    """Object storage."""
    driver: Driver
    """The compute cluster."""
    stopping: threading.Event
    """Set when the scheduler shuts down."""


@dataclass(slots=True)
class _Pass:
    """One survey pass on its way."""

    survey: Survey
    index: int
    facts: Facts
    missing: int
    tally: Tally
    """The summaries that came so far."""


@dataclass(frozen=True, slots=True)
class _Task:
    """A request, made when its turn comes, and what to do with its answer."""

    request: Callable[[], TaskRequest]
    finish: Callable[[JSONValue], None]
    part: str | None = None
    """Id of the part that it makes, if it makes one."""


class Work:
    """Makes all parts of a plan that are not recorded yet, of those shards that are not complete."""

    def __init__(
        self,
        record: JobRecord,
        lease: Lease,
        tools: Tools,
        output: Output,
        planned: Planned,
        check: Callable[[], None],
        plan: Plan | None = None,
    ) -> None:
        """
        :param plan: which of the plans that a recipe of several documents has; by default the output's.
        """
        self._record = record
        self._lease = lease
        self._tools = tools
        self._output = output
        self._plan = plan or planned.plan
        self._check = check
        self._known = KnownDigests(planned.checkpoints)
        self._needs = needs(self._plan.price, tools.settings.gpu_memory_bytes)
        self._store_json = _plain(tools.settings.store)
        self._ids = {
            (part.shard, part.number): identity
            for part, identity in zip(self._plan.parts, self._plan.part_ids, strict=True)
        }
        self._results: dict[str, PartResult] = {}
        self._facts: dict[str, Facts] = {}
        self._ready: deque[_Task] = deque()
        self._waiting: dict[str, list[Part]] = {}
        self._made: list[PartResult] = []
        self._progress = Progress(output, planned.plan, record.uploads)
        self._saved_at = time.monotonic()

    @tracing.traced("work")
    def run(self) -> None:
        """Make what is missing; returns when the store holds every part of every shard.

        :raises UploadNotFoundError: a shard's upload is gone, and with it the parts in it.
        """
        self._restore()
        again = 2
        while missing := self._missing():
            if not again:
                raise StoreError(f"the store lost {len(missing)} part(s) again after they were made twice")
            again -= 1
            self._make(missing)
        self._progress.save()  # a commit goes on from there when Redis is lost: its uploads tell nothing any more

    def _restore(self) -> None:
        saved, recorded = self._progress.load(), self._tools.jobs.parts(self._record.id)
        lost = [result for part, result in saved.items() if part not in recorded]
        if lost:  # Redis lost them, the object store did not
            self._tools.jobs.record_part(self._lease, *lost)
        for part, result in recorded.items():
            if saved.get(part) != result:
                self._progress.add(result)
        self._results = saved | recorded

    def _missing(self) -> list[Part]:
        """Parts without a record, or whose record the store does not bear out."""
        held = {
            (shard.name, part.number): part
            for shard in self._plan.shards
            if shard.name not in self._record.completed_shards
            for part in self._output.held_parts(shard.name, self._record.uploads)
        }
        missing = []
        for part, identity in zip(self._plan.parts, self._plan.part_ids, strict=True):
            if part.shard in self._record.completed_shards:
                continue
            result = self._results.get(identity)
            there = held.get((part.shard, part.number))
            if result is None or there is None or (there.size, there.etag) != (result.size, result.etag):
                missing.append(part)
        return missing

    def _make(self, missing: Iterable[Part]) -> None:
        wanted: set[str] = set()
        for part in missing:
            wanted.update(survey for survey in part.surveys if survey not in self._facts)
            self._queue(part)
        recorded = self._tools.jobs.surveys(self._record.id)
        for survey in self._plan.surveys:
            if survey.id in wanted:
                begun = [index for index in range(survey.passes) if (survey.id, index) in recorded]
                index = 1 + max(begun, default=-1)
                self._survey(survey, index, recorded[survey.id, index - 1] if index else {})
        self._loop()

    def _queue(self, part: Part) -> None:
        """Queue a part once the surveys that it needs are done."""
        unknown = next((survey for survey in part.surveys if survey not in self._facts), None)
        if unknown is None:
            identity = self._ids[part.shard, part.number]
            self._ready.append(_Task(partial(self._part_request, part, identity), self._part_done, identity))
        else:
            self._waiting.setdefault(unknown, []).append(part)

    def _loop(self) -> None:
        flying: dict[Future[JSONValue], tuple[_Task, str, tracing.Span]] = {}
        landed: SimpleQueue[Future[JSONValue]] = (
            SimpleQueue()
        )  # of thousands in flight, only these are looked at
        settings = self._tools.settings
        try:
            while self._ready or flying:
                self._check()
                while self._ready and len(flying) < settings.max_parts_in_flight:
                    task = self._ready.popleft()
                    span = (
                        tracing.begin("part", {"mergemill.part": task.part})
                        if task.part
                        else tracing.begin("survey")
                    )
                    with span.active():
                        request = task.request()
                        future = self._tools.driver.submit(request)
                    flying[future] = task, request.label, span
                    future.add_done_callback(landed.put)
                done = _drain(landed, settings.busy_poll_seconds)
                for future in filterfalse(_failed, done):
                    self._landed(*flying.pop(future), future)
                self._record_made()
                for future in filter(_failed, done):  # ends it, now that what is finished is recorded
                    self._landed(*flying.pop(future), future)
                self._save_progress()
        finally:
            for future, (_, _, span) in flying.items():
                self._tools.driver.cancel(future)
                span.end(CancelledError())

    def _landed(self, task: _Task, label: str, span: tracing.Span, future: Future[JSONValue]) -> None:
        try:
            answer = future.result()
        except MergemillError as error:
            if isinstance(error, FleetError):
                said = str(error) if label in str(error) else f"{label}: {error}"
                error = FleetError(said + self._suspects(task, said))
            error.part = task.part
            span.end(error)
            log.warning("task failed", part=task.part, error=type(error).__name__, detail=str(error))
            raise error
        span.end()
        task.finish(answer)

    def _suspects(self, task: _Task, said: str) -> str:
        parts = zip(self._plan.parts, self._plan.part_ids, strict=True)
        return next((suspects(part, said) for part, identity in parts if identity == task.part), "")

    def _part_request(self, part: Part, identity: str) -> TaskRequest:
        upload = self._output.upload(part.shard, self._record.uploads)
        payload = {
            "part": PART.dump_json(part, ensure_ascii=True).decode(),
            "upload": {"uri": upload.uri, "id": upload.id},
            "facts": {survey: self._facts[survey] for survey in part.surveys},
            "known": self._known.of(part.reads),
        }
        return self._request(payload, part_label(part), part=identity)

    def _request(self, payload: dict[str, JSONValue], label: str, **ids: str) -> TaskRequest:
        """A task of this job: they all want the same of a worker, and so any of them can share one."""
        wanted = self._needs
        ids |= {"job": self._record.id, **self._record.origin}
        if (here := tracing.traceparent()) is not None:
            ids["traceparent"] = here
        shared = {
            "ids": ids,
            "store": self._store_json,
            "device": wanted.device,
            "arena_bytes": self._plan.price.arena_bytes,
        }
        return TaskRequest(
            entry=TASKS_ENTRY,
            payload=payload | shared,
            memory_bytes=wanted.memory_bytes,
            num_cpus=wanted.cpus,
            num_gpus=wanted.gpus,
            label=label,
            ids=ids,
            stream=self._record.id,
        )

    def _part_done(self, answer: JSONValue) -> None:
        self._made.append(PART_RESULT.validate_json(answer))

    def _record_made(self) -> None:
        """Record the parts that came together, in one step: a part counts once this is through."""
        if not self._made:
            return
        for result in self._made:
            metrics.part_done(result, self._plan.price.peak_bytes)
        self._tools.jobs.record_part(self._lease, *self._made)
        for result in self._made:
            self._results[result.part] = result
            self._progress.add(result)
        self._made.clear()

    def _survey(self, survey: Survey, index: int, facts: Facts) -> None:
        """Go on with a survey whose passes before ``index`` found ``facts``.

        A pass is recorded once it is done as a whole, so a job that is resumed within one begins that one anew. A
        pass that is not needed any more is recorded with what is known.
        """
        passes = _passes_of(survey)
        wanted = next_pass(passes, index, facts)
        for needless in range(index, wanted):
            self._tools.jobs.record_survey(self._lease, survey.id, needless, facts, 0)
        if wanted == survey.passes:
            self._facts[survey.id] = facts
            for part in self._waiting.pop(survey.id, []):
                self._queue(part)
            return
        state = _Pass(survey, wanted, facts, len(survey.tasks), Tally(passes[wanted]))
        done = partial(self._summary_done, state)
        tasks = [_Task(partial(self._survey_request, state, runs), done) for runs in survey.tasks]
        self._ready.extendleft(reversed(tasks))  # before any part: parts wait for surveys

    def _survey_request(self, state: _Pass, runs: tuple[Arithmetic, ...]) -> TaskRequest:
        survey, allow_nonfinite = state.survey, self._plan.parts[0].allow_nonfinite
        task = SurveyTask(survey.id, state.index, runs, state.facts, allow_nonfinite)
        payload = {
            "survey": SURVEY_TASK.dump_json(task, ensure_ascii=True).decode(),
            "known": self._known.of(task.refs),
        }
        label = f"survey of {label_of(run.name for run in runs)}, pass {state.index + 1} of {survey.passes}"
        return self._request(payload, label, survey=survey.id)

    def _summary_done(self, state: _Pass, summary: Summary) -> None:
        survey = state.survey
        metrics.SURVEY_TASKS.inc()
        state.tally.add(summary)
        state.missing -= 1
        if state.missing:
            return
        survey_pass = _passes_of(survey)[state.index]
        facts = conclude_pass(survey_pass, [state.tally.total], survey.numel, state.facts)
        read = sum(Arrangement(refs_of(runs)).bytes_read for runs in survey.tasks)
        metrics.READ_BYTES.labels("survey").inc(read)
        self._tools.jobs.record_survey(self._lease, survey.id, state.index, facts, read)
        self._survey(survey, state.index + 1, facts)

    def _save_progress(self) -> None:
        """Now and then, and never for more than a small share of the time, write the records beside the output."""
        now = time.monotonic()
        if self._progress.is_saved or now - self._saved_at < self._tools.settings.progress_seconds:
            return
        self._progress.save()
        self._saved_at = time.monotonic() + 20 * (time.monotonic() - now)


def _passes_of(survey: Survey) -> tuple[SurveyPass, ...]:
    """What a survey's passes do: all of its runs share a method and parameters."""
    return bind(survey.tasks[0][0]).passes


def _drain(queue: SimpleQueue[_T], timeout_s: float) -> list[_T]:
    """What is in a queue, or comes within the timeout."""
    found: list[_T] = []
    with suppress(Empty):
        found.append(queue.get(timeout=timeout_s))
        while True:
            found.append(queue.get_nowait())
    return found


def _failed(future: Future[JSONValue]) -> bool:
    return future.exception() is not None


def _plain(settings: StoreSettings) -> JSONValue:
    """Store settings as workers need them: with the secrets that a JSON dump would hide."""
    return {
        name: value.get_secret_value() if isinstance(value, SecretStr) else value
        for name, value in settings
        if value is not None
    }
