"""Whoever owned a job once, and goes on too late, changes nothing any more: at any step of the job.

A step is the moment at which the owner has just made sure that the job is its own, and is about to change something.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from service.jobs.record import JobState
from tests import waiting
from tests.e2e.bench import JOB_CHANGES, Bench, KilledError, Steps, at_step, raising
from tests.e2e.overwriting import PREPARATIONS, SHARD_BYTES, content, recipe
from workers.store import fence

pytestmark = pytest.mark.valkey

WATCHED = JOB_CHANGES | {"renew"}
LEASE_S = 3.0
DEADLINE_S = 90.0


class Clock:
    """The time, as a fence sees it."""

    ahead = 0.0

    def time(self) -> float:
        """Unix seconds."""
        return time.time() + self.ahead


class Late:
    """After one step the runner's lease runs out, and others get on; then it goes on, and sees what time it is."""

    def __init__(self, bench: Bench, models: Path, out: Path, job: str, number: int, clock: Clock) -> None:
        self.other = ""
        """The job that has begun to replace the output."""
        self.seen: dict[str, bytes] = {}
        """What lies there then."""
        self._bench, self._models, self._out, self._job = bench, models, out, job
        self._number, self._clock = number, clock
        self._runner = bench.runner(job, Steps(self._hook), watched=WATCHED)

    def run(self) -> None:
        """Run the job."""
        self._runner.run()
        self._clock.ahead = 0

    def _hook(self, step: int, when: str, _: str) -> None:
        if (step, when) != (self._number, "after"):
            return
        bench = self._bench
        bench.jobs.release(self._runner.lease)
        assert bench.run(self._job).state == JobState.SUCCEEDED
        self.other = replacing(bench, self._models, self._out)
        with pytest.raises(KilledError):
            bench.run(self.other, at_step("complete model-00002", raising(KilledError())))
        self.seen = content(self._out)
        self._clock.ahead = 3600


def merging(bench: Bench, models: Path, out: Path, before: str) -> str:
    """Queue a merge into a place with something in it."""
    if (prepare := PREPARATIONS[before]) is not None:
        prepare(out)
    return bench.submit(recipe(models), out, shard_bytes=SHARD_BYTES, overwrite=prepare is not None)


def replacing(bench: Bench, models: Path, out: Path) -> str:
    """Queue a merge with another method, which replaces what is there."""
    return bench.submit(recipe(models, "task_arithmetic"), out, shard_bytes=SHARD_BYTES, overwrite=True)


def watched_steps(bench: Bench, job: str) -> list[str]:
    """Run a job; its steps, renewals among them."""
    steps = Steps()
    bench.runner(job, steps, watched=WATCHED).run()
    assert bench.jobs.get(job).state == JobState.SUCCEEDED
    return steps.names


@pytest.mark.parametrize("before", ["empty", "same"])
def test_who_wakes_too_late_changes_nothing_of_the_job_that_replaces_the_output_since(
    bench: Bench, models: Path, tmp_path: Path, before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it sleeps another runner finishes the job, and another job has begun to replace what that made."""
    clock = Clock()
    monkeypatch.setattr(fence, "time", clock)
    steps = watched_steps(bench, merging(bench, models, tmp_path / "whole", before))
    assert bench.run(replacing(bench, models, tmp_path / "other")).state == JobState.SUCCEEDED
    wanted = content(tmp_path / "other")
    for number in [number for number, name in enumerate(steps) if name == "renew"]:
        out = tmp_path / str(number)
        late = Late(bench, models, out, merging(bench, models, out, before), number, clock)
        late.run()
        where = f"at step {number}, for {steps[number - 1]}"
        assert content(out) == late.seen, where
        assert bench.run(late.other).state == JobState.SUCCEEDED, where
        assert content(out) == wanted, where


@contextmanager
def scheduler(bench: Bench, steps: dict[str, int], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A scheduler in a process of its own, that holds jobs at these steps."""
    settings = {
        "redis_url": bench.settings.redis_url,
        "namespace": bench.settings.namespace,
        "lease_seconds": LEASE_S,
        "poll_seconds": 0.01,
        "max_running_jobs": max(1, len(steps)),
    }
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.paused_scheduler"], stdin=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"settings": settings, "steps": steps}).encode() + b"\n")
            process.stdin.close()
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(DEADLINE_S)


until = partial(waiting.until, seconds=DEADLINE_S)


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process was stopped by a signal."""
    assert process.poll() is None, "the scheduler has ended"
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def told(bench: Bench, raw: redis.Redis, job: str, event: str) -> int:
    """How often an event of a job was told."""
    entries: Any = raw.xrange(f"{bench.settings.namespace}:job:{job}:events")
    return sum(fields["event"] == event for _, fields in entries)


def test_a_process_that_is_stopped_past_its_leases_does_no_harm_and_works_on(
    bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis
) -> None:
    """One job for every step of an overwrite, all stopped at once; another process finishes them."""

    def submit(name: str) -> str:
        return merging(bench, models, tmp_path / name, "more shards")

    names = watched_steps(bench, submit("whole"))
    wanted = content(tmp_path / "whole")
    steps = {submit(str(number)): number for number in range(1, names.count("renew") + 1)}
    log = tmp_path / "sleeper.log"
    with scheduler(bench, steps, log) as sleeper:
        until(lambda: is_stopped(sleeper), "the sleeper does not stop")
        with scheduler(bench, {}, tmp_path / "other.log"):
            until(
                lambda: all(bench.jobs.get(job).state.is_terminal for job in steps),
                "the other scheduler does not finish the jobs",
            )
        os.kill(sleeper.pid, signal.SIGCONT)
        until(lambda: log.read_text().count('"lease lost') >= len(steps), "the sleeper does not see it")
        last = submit("last")  # nobody else is there
        until(lambda: bench.jobs.get(last).state.is_terminal, "the sleeper does not work on")
    for job, number in {**steps, last: "last"}.items():
        where = f"held at step {number}: {bench.jobs.get(job).error}"
        assert bench.jobs.get(job).state == JobState.SUCCEEDED, where
        assert content(tmp_path / str(number)) == wanted, where
        assert told(bench, raw, job, "succeeded") == 1, where
    assert '"level": "error"' not in log.read_text()
