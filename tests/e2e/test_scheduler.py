"""When a scheduler looks for work."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from service.jobs.jobstore import JobStore
from service.jobs.record import JobState, new_job
from service.running.scheduler import Scheduler
from service.settings import Settings
from tests.e2e.bench import LocalDriver

pytestmark = pytest.mark.valkey


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
