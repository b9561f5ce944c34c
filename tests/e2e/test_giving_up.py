"""How a job gives up: what a failure or a cancel leaves behind, wherever it comes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from service.jobs.record import JobState
from service.jobs.transitions import CancelRequested
from tests.checkpoints import fine_tune, write_checkpoint
from tests.e2e.bench import Bench, KilledError, Steps, at_step, raising
from tests.e2e.means import is_mean, nothing_at, submit
from workers.errors import IllegalTransitionError, JobStoreUnavailableError

pytestmark = pytest.mark.valkey


def test_giving_up_leaves_the_checkpoint_that_was_there(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The one from before may have been made by the very same plan, and say so."""
    assert bench.run(submit(bench, tmp_path)).state == JobState.SUCCEEDED
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    job = submit(bench, tmp_path, overwrite=True)

    def cancel_unreadably() -> None:
        shard = tmp_path / "out" / "model-00001-of-00002.safetensors"
        record = bench.jobs.get(job)
        bench.store.put(f"file://{shard}", shard.read_bytes(), {"mergemill-plan": str(record.plan_digest)})
        bench.jobs.apply(job, CancelRequested())

    assert bench.run(job, at_step("record_part", cancel_unreadably)).state == JobState.CANCELLED
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_failure_leaves_nothing_behind_wherever_giving_up_is_interrupted(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """NaN in what the last part reads: all others are there by then."""
    bad = fine_tune(base, 1, 0.1)
    bad["model.norm.weight"][0] = torch.nan
    write_checkpoint(tmp_path / "one", bad)
    whole = Steps()
    record = bench.run(submit(bench, tmp_path), whole)
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert "model.norm.weight" in str(record.error["detail"])
    assert nothing_at(tmp_path / "out")
    assert "record_part" in whole.names
    for number in range(whole.names.index("record_part"), len(whole.names)):
        job = submit(bench, tmp_path, str(number))
        bench.run_until(job, number)
        record = bench.run(job)
        assert record.state == JobState.FAILED, whole.names[number]
        assert "model.norm.weight" in str(record.error)
        # Who takes it over in the middle of that goes on with it, and does not begin again.
        assert "restarted" not in {entry.event for entry in record.history}, whole.names[number]
        assert nothing_at(tmp_path / str(number)), whole.names[number]


def test_a_cancel_ends_the_job_wherever_it_comes(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Before the commit starts, everything is gone when the job is cancelled; from there on it is refused."""
    whole = Steps()
    assert bench.run(submit(bench, tmp_path), whole).state == JobState.SUCCEEDED
    commit = whole.names.index("apply commit_started")
    for number, name in enumerate(whole.names):
        out = tmp_path / str(number)
        if number % 2:
            out.mkdir()
        job = submit(bench, tmp_path, str(number))

        def cancel(step: int, moment: str, what: str, number: int = number, job: str = job) -> None:
            if what == "apply cancelled" and moment == "before":
                assert nothing_at(tmp_path / str(number))
            if (step, moment) != (number, "before"):
                return
            if number > commit:
                with pytest.raises(IllegalTransitionError):
                    bench.jobs.apply(job, CancelRequested())
            else:
                bench.jobs.apply(job, CancelRequested())

        record = bench.run(job, Steps(cancel))
        if number > commit:
            assert record.state == JobState.SUCCEEDED, name
            continue
        assert record.state == JobState.CANCELLED, f"{name}: {record.error}"
        assert nothing_at(out), name
        assert out.exists() == bool(number % 2), (
            name
        )  # the job takes away the directory that it made, and no other
    assert bench.run(submit(bench, tmp_path, str(commit))).state == JobState.SUCCEEDED
    assert is_mean(tmp_path, str(commit))


def test_a_queued_job_that_was_cancelled_while_it_was_taken_stays_cancelled(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = submit(bench, tmp_path)
    runner = bench.runner(job)
    bench.jobs.apply(job, CancelRequested())
    runner.run()
    assert bench.jobs.get(job).state == JobState.CANCELLED
    assert nothing_at(tmp_path / "out")


def test_a_job_store_that_is_out_of_reach_at_the_end_does_not_fail_the_job(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = submit(bench, tmp_path)
    away = threading.Event()

    def cut(_: int, moment: str, name: str) -> None:
        if name == "apply commit_started" and moment == "before":
            bench.jobs.apply(job, CancelRequested())
        if name.startswith("abort") and moment == "before" and not away.is_set():
            away.set()
            raise JobStoreUnavailableError("Redis is away")

    assert bench.run(job, Steps(cut)).state == JobState.RUNNING  # until somebody takes it over
    assert bench.run(job).state == JobState.CANCELLED
    assert nothing_at(tmp_path / "out")


@pytest.mark.parametrize("at", ["apply planned", "apply uploads_opened"])
def test_a_cancel_that_comes_while_the_record_is_written_is_heard_before_the_next_part(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, at: str
) -> None:
    """The record that is written then has the cancel in it, so there is no news of it to be seen."""
    job = submit(bench, tmp_path)
    cancel = at_step(at, lambda: bench.jobs.apply(job, CancelRequested()))
    assert bench.run(job, cancel).state == JobState.CANCELLED
    assert bench.driver.labels == []
    assert nothing_at(tmp_path / "out")


def test_whoever_takes_over_a_job_that_was_cancelled_makes_nothing_of_it(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = submit(bench, tmp_path)
    with pytest.raises(KilledError):
        bench.run(job, at_step("record_part", raising(KilledError())))
    made = len(bench.driver.labels)
    bench.jobs.apply(job, CancelRequested())
    assert bench.run(job).state == JobState.CANCELLED
    assert len(bench.driver.labels) == made
    assert nothing_at(tmp_path / "out")
