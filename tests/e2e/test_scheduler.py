"""When a scheduler looks for work."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from service.jobs.jobstore import JobStore, Lease
from service.jobs.record import JobRecord, JobState, new_job
from service.running.scheduler import RENEWALS_PER_LEASE, Scheduler
from service.running.work import Tools
from service.settings import Settings
from tests.e2e.bench import LocalDriver
from tests.waiting import until

pytestmark = pytest.mark.valkey


class Patient:
    """A runner that ends when it is told to, whatever becomes of its lease."""

    all: ClassVar[list[Patient]] = []

    def __init__(self, record: JobRecord, lease: Lease, _: Tools) -> None:
        self.lease, self.lost, self.may_end = lease, threading.Event(), threading.Event()
        self.all.append(self)

    def run(self) -> None:
        self.may_end.wait(60)


def test_a_job_that_is_taken_again_before_its_last_runner_has_ended_keeps_its_lease(
    valkey_url: str, valkey_namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.running.scheduler.JobRunner", Patient)
    monkeypatch.setattr(Patient, "all", [])
    settings = Settings(
        redis_url=valkey_url, namespace=valkey_namespace, poll_seconds=0.02, lease_seconds=2.0
    )
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "missing")}]}
    with JobStore(valkey_url, valkey_namespace) as jobs:
        job = jobs.create(new_job(recipe, f"file://{tmp_path}/out", {}, time.time()))
        scheduler = Scheduler(settings, jobs, LocalDriver())  # type: ignore[arg-type]
        thread = threading.Thread(target=scheduler.run)
        thread.start()
        try:
            until(lambda: len(Patient.all) == 1, "the job was not taken")
            jobs.release(Patient.all[0].lease)  # as if it had run out
            until(lambda: len(Patient.all) == 2, "it was not taken again")
            first, second = Patient.all
            assert (first.lease.job, first.lease.token) != (second.lease.job, second.lease.token)
            renewed: list[Lease] = []
            renew = jobs.renew
            monkeypatch.setattr(jobs, "renew", lambda lease: (renew(lease), renewed.append(lease)))
            first.may_end.set()
            until(lambda: [each for each, _ in scheduler._snapshot()] == [second], "the other one has gone")
            renewed.clear()
            # For longer than the lease lasts.
            until(lambda: renewed == [second.lease] * (RENEWALS_PER_LEASE + 2), "nobody renews its lease")
            assert len(Patient.all) == 2
            assert not second.lost.is_set()
            jobs.renew(second.lease)
            assert jobs.status(job).owner == scheduler.owner
        finally:
            scheduler.stop()
            for runner in Patient.all:
                runner.may_end.set()
            thread.join()


def test_the_end_of_a_job_lets_the_next_begin_at_once(
    valkey_url: str, valkey_namespace: str, tmp_path: Path
) -> None:
    settings = Settings(
        redis_url=valkey_url, namespace=valkey_namespace, poll_seconds=600, max_running_jobs=1
    )
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "missing")}]}
    with JobStore(valkey_url, valkey_namespace) as jobs:
        outputs = [f"file://{tmp_path}/{number}" for number in range(3)]
        waiting = [jobs.create(new_job(recipe, output, {}, time.time())) for output in outputs]
        scheduler = Scheduler(settings, jobs, LocalDriver())  # type: ignore[arg-type]
        thread = threading.Thread(target=scheduler.run)
        thread.start()
        try:
            deadline = time.monotonic() + 30
            while not all(jobs.get(job).state == JobState.FAILED for job in waiting):
                assert time.monotonic() < deadline, [jobs.get(job).state for job in waiting]
                time.sleep(0.02)
        finally:
            scheduler.stop()
            thread.join()
