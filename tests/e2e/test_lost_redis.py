"""A job goes on after Redis came back empty, wherever it stood, from what lies beside its output."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import redis

from service.jobs.record import JobState
from service.running.recovery import Recovery
from tests.e2e.bench import Bench, KilledError, Steps
from tests.e2e.lost import killed, lose, recovered, submit
from tests.e2e.overwriting import content
from workers.errors import (
    NothingToRecoverError,
)

pytestmark = pytest.mark.valkey

SAME = ("id", "recipe", "output", "options", "origin", "priority", "created_at")
"""What a recovered record has of the lost one, wherever the job stood."""
PLANNED = (
    "plan_digest",
    "semantics_version",
    "price",
    "notices",
    "bytes_total",
    "parts_total",
    "surveys_total",
)


@pytest.mark.parametrize("before", ["empty", "same"])
def test_a_job_that_was_lost_at_any_step_ends_in_the_same_bytes_with_no_finished_part_made_again(
    bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis, before: str
) -> None:
    steps = Steps()
    first = bench.run(submit(bench, models, tmp_path / "whole", before), steps)
    wanted, parts = content(tmp_path / "whole"), len(bench.driver.labels)
    assert (first.state, parts) == (JobState.SUCCEEDED, first.parts_total)
    claimed = steps.names.index("put_if_absent claim.json")
    ended = steps.names.index("delete claim.json")
    committed = steps.names.index("apply commit_started")
    states = set()
    for number, name in enumerate(steps.names):
        if before != "empty" and number < committed:
            continue  # nothing is replaced yet
        where = f"before step {number}, {name}"
        out = tmp_path / str(number)
        job = submit(bench, models, out, before)
        bench.run_until(job, number)
        lost, saved = bench.jobs.get(job), _saved(out)
        lose(bench, raw)
        if not claimed < number <= ended:
            with pytest.raises(NothingToRecoverError):
                recovered(bench, out)
            continue
        found = recovered(bench, out)
        states.add(found.record.state)
        assert found.was_lost, where
        assert found.parts == len(saved), where
        for field in SAME:
            assert getattr(found.record, field) == getattr(lost, field), (field, where)
        if found.record.state != JobState.QUEUED:
            for field in PLANNED:
                assert getattr(found.record, field) == getattr(lost, field), (field, where)
            assert found.record.uploads == (lost.uploads or found.record.uploads), where
        bench.driver.labels.clear()
        record = bench.run(job)
        assert record.state == JobState.SUCCEEDED, f"{where}: {record.error}"
        assert record.summary == first.summary, where
        assert content(out) == wanted, where
        assert len(bench.driver.labels) == (0 if number > committed else parts - len(saved)), where
    wanted_states = {JobState.RUNNING, JobState.COMMITTING}
    assert states == (wanted_states | {JobState.QUEUED} if before == "empty" else wanted_states)


def test_of_parts_that_are_made_one_by_one_only_the_unfinished_are_made_again(
    valkey_url: str, bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis
) -> None:
    """Redis is lost with the second part, whose bytes the store has; their record had been in Redis alone."""
    slow = Bench(valkey_url, bench.settings.namespace, max_parts_in_flight=1)
    recorded: list[str] = []

    def die(_: int, when: str, name: str) -> None:
        if (when, name) == ("after", "record_part"):
            recorded.append(name)
            if len(recorded) == 2:
                raise KilledError

    with slow.jobs:
        job = submit(slow, models, tmp_path / "out")
        with pytest.raises(KilledError):
            slow.run(job, Steps(die))
        assert len(slow.jobs.parts(job)) == 2
        lose(slow, raw)
        assert recovered(slow, tmp_path / "out").parts == 1
        slow.driver.labels.clear()
        assert slow.run(job).state == JobState.SUCCEEDED
        assert len(slow.driver.labels) == 1


def test_every_part_is_recorded_beside_the_output_before_a_shard_is_completed(
    valkey_url: str, bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis
) -> None:
    """However seldom progress is written: what a completed shard is made of is nowhere else any more."""
    lazy = Bench(valkey_url, bench.settings.namespace, progress_seconds=3600)
    with lazy.jobs:
        job = submit(lazy, models, tmp_path / "out")
        killed(lazy, job, "complete model-00002")
        lose(lazy, raw)
        found = recovered(lazy, tmp_path / "out")
        assert (found.record.state, found.parts) == (JobState.COMMITTING, 2)
        lazy.driver.labels.clear()
        assert lazy.run(job).state == JobState.SUCCEEDED
        assert lazy.driver.labels == []


def _saved(out: Path) -> list[Any]:
    """The parts recorded beside an output."""
    pages = sorted(out.glob(".mergemill/progress-*.json"))
    return [part for page in pages for part in json.loads(page.read_text())["parts"]]


def test_a_job_that_is_there_is_left_alone(bench: Bench, models: Path, tmp_path: Path) -> None:
    job = submit(bench, models, tmp_path / "out")
    before = killed(bench, job, "complete model-00002")
    found = recovered(bench, tmp_path / "out", whose=None)
    assert (found.was_lost, found.record, found.parts) == (False, before, before.parts_total)
    assert bench.jobs.get(job) == before
    assert bench.run(job).state == JobState.SUCCEEDED


def test_of_two_that_recover_at_once_one_makes_the_record(
    bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis
) -> None:
    job = submit(bench, models, tmp_path / "out")
    killed(bench, job, "complete model-00002")
    lose(bench, raw)
    found: list[Recovery] = []
    ready = threading.Barrier(4)

    class Slow:
        """All have read the claim, and found no job, before any of them goes on."""

        def __getattr__(self, name: str) -> Any:
            if name == "list_uploads":
                ready.wait(10)
            return getattr(bench.store, name)

    threads = [
        threading.Thread(target=lambda: found.append(recovered(bench, tmp_path / "out", store=Slow())))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.was_lost for each in found) == [False, False, False, True]
    assert len({each.record.id for each in found}) == 1
    assert len(bench.jobs.parts(job)) == bench.jobs.get(job).parts_total
    status = bench.jobs.status(job)
    assert status.bytes_done == status.record.bytes_total
    assert bench.run(job).state == JobState.SUCCEEDED
