"""A cancel takes effect within seconds, whatever the job is waiting for, and whoever had it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from service.jobs.record import JobState
from service.jobs.transitions import CancelRequested
from service.running import runner
from service.running.sweeper import Sweeper
from tests.checkpoints import write_checkpoint
from tests.e2e.bench import Bench, KilledError, at_step, raising
from tests.e2e.means import is_mean, nothing_at, submit
from tests.e2e.stalls import Stalling

pytestmark = pytest.mark.valkey


class Counting:
    """A store that counts what it is asked to look up, and takes a moment for each."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.looked_up: list[str] = []

    def head(self, uri: str) -> Any:
        self.looked_up.append(uri)
        time.sleep(0.005)
        return self._store.head(uri)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_job_that_opens_thousands_of_files_opens_no_more_of_them(bench: Bench, tmp_path: Path) -> None:
    tensors = {f"model.layers.{number}.weight": torch.ones(4) for number in range(700)}
    for name in ("one", "base"):
        write_checkpoint(tmp_path / name, tensors, shard_bytes=16)
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == 700
    job, store = submit(bench, tmp_path), Counting(bench.store)
    held = bench.runner(job, store=store)
    thread = threading.Thread(target=held.run)
    thread.start()
    until(lambda: len(store.looked_up) > 100)
    bench.jobs.apply(job, CancelRequested())
    thread.join(10)
    assert bench.jobs.get(job).state == JobState.CANCELLED
    assert len(store.looked_up) < 1000, "it went on through all of them"
    assert nothing_at(tmp_path / "out")


@pytest.mark.parametrize(
    "method", ["read_into", "check_writable", "put_if_absent", "open_upload", "list_parts"]
)
def test_a_store_that_stalls_holds_up_no_cancel(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """And what it does when it comes back, long after, is cleared away."""
    monkeypatch.setattr(runner, "STALL_S", 0.3)
    job = submit(bench, tmp_path)
    store = Stalling(bench.store, method, lambda: bench.jobs.apply(job, CancelRequested()))
    began = time.monotonic()
    record = bench.run(job, store=store)
    assert time.monotonic() - began < 5
    assert record.state == JobState.CANCELLED
    assert bench.driver.labels == []
    store.go_on()
    if method in {"put_if_absent", "open_upload"}:  # made after the job was over
        assert "could not be cleared away yet" in record.history[-1].detail
    sweeper = Sweeper(bench.settings, bench.jobs, bench.store, "a test")
    assert sweeper.sweep()
    assert nothing_at(tmp_path / "out")
    assert bench.run(submit(bench, tmp_path)).state == JobState.SUCCEEDED
    assert is_mean(tmp_path)


@pytest.mark.parametrize("at", ["apply planned", "claim_output", "apply uploads_opened", "record_part"])
def test_another_scheduler_cancels_what_the_dead_one_was_asked_to(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, at: str
) -> None:
    job = submit(bench, tmp_path)
    with pytest.raises(KilledError):
        bench.run(job, at_step(at, raising(KilledError())))
    bench.jobs.apply(job, CancelRequested())
    made = len(bench.driver.labels)
    assert bench.run(job).state == JobState.CANCELLED
    assert len(bench.driver.labels) == made, "it was worked at"
    assert nothing_at(tmp_path / "out")


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
