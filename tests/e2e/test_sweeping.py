"""What is cleared away after jobs have ended, and what is not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from service.jobs.record import JobState
from service.jobs.sweepstore import SweepStore
from service.jobs.transitions import CancelRequested
from service.running.claim import Claim
from service.running.sweeper import Sweeper
from service.watching import metrics
from tests.e2e.bench import Bench, KilledError, Steps, at_step, raising
from tests.e2e.means import is_mean, nothing_at, submit
from workers.errors import JobNotFoundError, StoreUnavailableError
from workers.store import join

pytestmark = pytest.mark.valkey

SHARD = "model-00001-of-00002.safetensors"
DAY = 86400.0


def sweeper(bench: Bench, **settings: float) -> Sweeper:
    """One of its own, that sweeps when it is told to."""
    return Sweeper(bench.settings.model_copy(update=settings), bench.jobs, bench.store, "a test")


def count(what: str) -> float:
    return float(metrics.SWEPT.labels(what)._value.get())


def age(root: Path, seconds: float) -> None:
    """Make everything below look older."""
    then = time.time() - seconds
    for path in (root, *root.rglob("*")):
        os.utime(path, (then, then))


def test_what_a_job_could_not_clear_away_is_swept_when_the_store_is_back(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = submit(bench, tmp_path)
    gone = True

    def cut(_: int, moment: str, name: str) -> None:
        if name == "record_part" and moment == "before":
            bench.jobs.apply(job, CancelRequested())
        if name.startswith("abort") and moment == "before" and gone:
            raise StoreUnavailableError("it is away")

    steps = Steps(cut)
    assert bench.run(job, steps).state == JobState.CANCELLED
    assert not nothing_at(tmp_path / "out")
    before = count("output")
    away = Sweeper(bench.settings, bench.jobs, steps.watch(bench.store, {"abort"}), "a test")
    assert away.sweep()
    assert not nothing_at(tmp_path / "out")
    with SweepStore(bench.settings.redis_url, bench.settings.namespace) as sweeps:
        assert sweeps.unswept(0.001) == (), "it would be tried again and again without a pause"
        assert sweeps.left(job)
        sweeps.postpone(job, 0)
    gone = False
    assert sweeper(bench).sweep()
    assert nothing_at(tmp_path / "out")
    assert count("output") > before


def test_old_uploads_are_aborted_and_young_ones_are_not(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """What a scheduler left that was paused for so long that its job had ended by the time it went on."""
    job = submit(bench, tmp_path)
    assert bench.run(job).state == JobState.SUCCEEDED
    uri = join(f"file://{tmp_path}/out", SHARD)
    upload = bench.store.open_upload(uri, 10, {})
    with SweepStore(bench.settings.redis_url, bench.settings.namespace) as sweeps:
        sweeps.postpone(job, sweeps.now() - 2 * DAY)  # as if it had ended then
        sweeper(bench).sweep()
        assert bench.store.list_uploads(uri) == [upload]
        age(tmp_path / "out" / ".mergemill", 2 * DAY)
        assert sweeps.unswept(sweeps.now()) == ()
    later = submit(bench, tmp_path, overwrite=True)
    with pytest.raises(KilledError):
        bench.run(later, at_step("claim_output", raising(KilledError())))
    bench.jobs.apply(later, CancelRequested())
    bench.run(later)
    with SweepStore(bench.settings.redis_url, bench.settings.namespace) as sweeps:
        sweeps.postpone(later, sweeps.now() - 2 * DAY)
    sweeper(bench).sweep()
    assert bench.store.list_uploads(uri) == []
    assert is_mean(tmp_path)


@pytest.mark.parametrize("at", ["apply uploads_opened", "put progress", "complete model-00002"])
def test_a_living_jobs_things_are_not_touched(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, at: str
) -> None:
    """At an output where another job failed, whose end is long past."""
    failed = submit(bench, tmp_path)
    with pytest.raises(KilledError):
        bench.run(failed, at_step("open_upload", raising(KilledError())))
    bench.jobs.apply(failed, CancelRequested())
    assert bench.run(failed).state == JobState.CANCELLED
    job = submit(bench, tmp_path)
    with SweepStore(bench.settings.redis_url, bench.settings.namespace) as sweeps:

        def sweep() -> None:
            age(tmp_path / "out", 2 * DAY)
            sweeps.postpone(failed, 0)
            before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")}
            assert sweeper(bench).sweep()
            assert {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")} == before
            assert sweeps.unswept(sweeps.now()) == (failed,), "it is not looked at again"

        record = bench.run(job, at_step(at, sweep))
    assert record.state == JobState.SUCCEEDED, record.error
    assert record.attempt == 1
    assert is_mean(tmp_path)


def test_the_claim_of_a_job_that_nobody_knows_is_left_alone(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Another deployment's, or one that a Redis came back without: `mergemill recover` needs it."""
    job = submit(bench, tmp_path)
    assert bench.run(job).state == JobState.SUCCEEDED
    uri = join(f"file://{tmp_path}/out", SHARD)
    bench.store.open_upload(uri, 10, {})
    nobody = "merge-00000000000000000000000000"
    claim = Claim(job=nobody, recipe={}, plan_digest="0" * 64, shards=()).to_bytes()
    bench.store.put(f"file://{tmp_path}/out/.mergemill/claim.json", claim)
    age(tmp_path / "out", 2 * DAY)
    with SweepStore(bench.settings.redis_url, bench.settings.namespace) as sweeps:
        sweeps.postpone(job, 0)
    assert sweeper(bench).sweep()
    assert len(bench.store.list_uploads(uri)) == 1
    assert (tmp_path / "out/.mergemill/claim.json").read_bytes() == claim


def test_old_records_are_forgotten_and_outputs_stay(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, living = submit(bench, tmp_path), submit(bench, tmp_path, "other")
    assert bench.run(old).state == JobState.SUCCEEDED
    assert sweeper(bench).sweep()
    assert bench.jobs.get(old)
    monkeypatch.setattr("service.running.retention.SOONEST_S", 0.0)
    before = count("record")
    assert sweeper(bench, retention_seconds=1e-6).sweep()
    with pytest.raises(JobNotFoundError):
        bench.jobs.get(old)
    assert bench.jobs.get(living).state == JobState.QUEUED
    assert count("record") == before + 1
    assert is_mean(tmp_path)


def test_a_job_waits_for_its_output_while_it_is_swept(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    over = submit(bench, tmp_path)
    runner = bench.runner(over)
    bench.jobs.apply(over, CancelRequested())
    runner.run()
    began = time.monotonic()
    lease = bench.jobs.acquire(over, "a sweeper", 2.0)
    assert lease is not None
    bench.jobs.claim_output(lease, f"file://{tmp_path}/out")
    assert bench.run(submit(bench, tmp_path)).state == JobState.SUCCEEDED
    assert time.monotonic() - began > 1.9, "it took the output from under the sweeper"
    assert is_mean(tmp_path)
