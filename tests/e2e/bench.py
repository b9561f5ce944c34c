"""One job runner in this process, on a real job store and a real object store, that can die at any step.

Parts are made by :mod:`workers.entry`, as on Ray, but in the calling thread: the steps of a job are then the same
in every run, so a test can count them in one run and break each of them in another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from service.cluster.driver import Capacity, TaskRequest
from service.jobs.jobstore import JobStore, Lease
from service.jobs.record import JobRecord, new_job
from service.jobs.transitions import Event, event_name
from service.recipe import parse_documents
from service.running.runner import JobRunner
from service.running.work import Tools
from service.settings import Settings
from workers.errors import MergemillError, from_json, to_json
from workers.store import StoreSettings, open_stores
from workers.store.base import ObjectStore
from workers.store.uris import name as base_name
from workers.store.uris import normalise

STORE_CHANGES = {"put", "put_if_absent", "delete", "open_upload", "complete", "abort"}
"""What a scheduler does to the object store."""
JOB_CHANGES = {"apply", "claim_output", "release_output", "record_part", "record_survey"}
"""What it does to the job store."""

Hook = Callable[[int, str, str], None]
"""Called with the step's number from 0, ``before`` or ``after``, and the step's name."""


class KilledError(BaseException):
    """The process ends here. No handler for errors sees it."""


class Steps:
    """Every change that a runner makes, in order; ``hook`` may do something around each."""

    def __init__(self, hook: Hook | None = None) -> None:
        self.names: list[str] = []
        self._hook = hook

    def watch(self, target: Any, changes: set[str]) -> Any:
        """``target``, with those of its methods counted that are in ``changes``."""
        return _Watched(target, changes, self)

    def step(self, name: str, call: Callable[[], Any]) -> Any:
        """Make one change."""
        number = len(self.names)
        self.names.append(name)
        if self._hook is not None:
            self._hook(number, "before", name)
        answer = call()
        if self._hook is not None:
            self._hook(number, "after", name)
        return answer


def at_step(name: str, act: Callable[[], None], when: str = "before") -> Steps:
    """Do something around the first step of that name."""
    seen: list[str] = []

    def hook(_: int, moment: str, step: str) -> None:
        if moment == when and step.startswith(name) and not seen:
            seen.append(step)
            act()

    return Steps(hook)


def raising(error: BaseException) -> Callable[[], None]:
    """A hook that raises."""

    def act() -> None:
        raise error

    return act


class _Watched:
    def __init__(self, target: Any, changes: set[str], steps: Steps) -> None:
        self._target = target
        self._changes = changes
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        if name not in self._changes:
            return method

        def change(*args: Any, **kwargs: Any) -> Any:
            what = f"{name} {_subject(name, args)}".strip()
            return self._steps.step(what, lambda: method(*args, **kwargs))

        return change


def _subject(method: str, args: tuple[Any, ...]) -> str:
    if method == "apply":
        event: Event = args[1]
        return event_name(event)
    if isinstance(args[0], Lease):
        return ""
    return base_name(getattr(args[0], "uri", args[0]))


class LocalDriver:
    """A :class:`service.cluster.driver.Driver` that does each task at once, here."""

    def __init__(self, memory_bytes: int = 1 << 40) -> None:
        self.labels: list[str] = []
        """Every task that was run."""
        self._memory_bytes = memory_bytes

    def submit(self, request: TaskRequest) -> Future[Any]:
        """Run a task."""
        self.labels.append(request.label)
        module, _, function = request.entry.partition(":")
        future: Future[Any] = Future()
        try:
            ((_, value),) = getattr(import_module(module), function)([request.payload])
        except MergemillError as error:
            value = error
        if isinstance(value, MergemillError):
            future.set_exception(from_json(to_json(value)))
        else:
            future.set_result(value)
        return future

    def cancel(self, future: Future[Any]) -> bool:
        """Give a task up."""
        return future.cancel()

    known_capacity: Capacity | None = None
    in_flight = 0

    def capacity(self, timeout_s: float | None = None) -> Capacity:
        """One node."""
        return Capacity(cpus=1, gpus=0, nodes=1, max_node_memory_bytes=self._memory_bytes)


class Bench:
    """Jobs of one namespace, run one step of a scheduler's life at a time."""

    def __init__(self, url: str, namespace: str, store: StoreSettings | None = None, **settings: Any) -> None:
        self.jobs = JobStore(url, namespace)
        self.settings = Settings(
            redis_url=url,
            namespace=namespace,
            store=store or StoreSettings(),
            **{
                "lease_seconds": 60.0,
                "poll_seconds": 0.001,
                "progress_seconds": 1e-6,
                "outage_seconds": 1e-3,
                **settings,
            },
        )
        self.store: ObjectStore = open_stores(self.settings.store)
        self.driver = LocalDriver()

    def submit(self, recipe: Any, output: Path | str, **options: Any) -> str:
        """Queue a job; its id."""
        chosen = {**self.settings.default_options.model_dump(mode="json"), **options}
        record = new_job(parse_documents(recipe).to_json(), normalise(str(output)), chosen, time.time())
        self.jobs.create(record)
        return record.id

    def run(self, job: str, steps: Steps | None = None, store: Any = None) -> JobRecord:
        """Run a job under a lease of its own until its runner returns; the record after that."""
        self.runner(job, steps, store).run()
        return self.jobs.get(job)

    def runner(
        self, job: str, steps: Steps | None = None, store: Any = None, watched: set[str] = JOB_CHANGES
    ) -> JobRunner:
        """A runner that has the job's lease; ``watched`` are the steps of the job store that count."""
        lease = self.jobs.acquire(job, "a test", self.settings.lease_seconds)
        assert lease is not None, f"somebody holds {job}"
        steps = steps or Steps()
        tools = Tools(
            self.settings,
            steps.watch(self.jobs, watched),
            steps.watch(store or self.store, STORE_CHANGES),
            self.driver,  # type: ignore[arg-type] # all of it that a runner uses
            threading.Event(),
        )
        return JobRunner(self.jobs.get(job), lease, tools)

    def run_until(self, job: str, number: int, store: Any = None) -> None:
        """Run a job and die before its step ``number``."""

        def die(step: int, moment: str, _: str) -> None:
            if (step, moment) == (number, "before"):
                raise KilledError

        with pytest.raises(KilledError):
            self.run(job, Steps(die), store)
