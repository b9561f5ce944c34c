"""``kill -9`` of a worker, the scheduler, Ray's driver or the API, at known moments of a real job on a real stack.

The moments come from locks on the files that the uploads of a directory are: while a test holds one exclusively, no
part of that shard can be uploaded; while it shares it, parts can, and the shard cannot be completed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import pytest
import torch

from mergemill.stack import EmbeddedStack
from service.cluster.warden import processes
from service.jobs.jobstore import JobStore
from service.jobs.record import JobRecord, JobState, new_job
from service.planning.plan import PlanOptions
from service.recipe import parse_recipe
from service.running.scheduler import Scheduler
from service.settings import Settings
from tests.checkpoints import fine_tune, llama_tensors, write_checkpoint
from tests.e2e.bench import LocalDriver
from tests.servers.keys import bearer

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

MIB = 1 << 20
DEADLINE_S = 50.0
LEASE_S = 2.0
OPTIONS = {"part_bytes": 5 * MIB, "shard_bytes": 12 * MIB}


def until(condition: Callable[[], Any], what: str, pause_s: float = 0.02) -> Any:
    """Wait for something to be true; what it was."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(pause_s)
    return found


@dataclass
class Rig:
    """A stack, its job store, a recipe and what it makes when nobody disturbs it."""

    stack: EmbeddedStack
    jobs: JobStore
    settings: Settings
    recipe: dict[str, Any]
    content: dict[str, str] = field(default_factory=dict)

    def submit(self, out: Path) -> str:
        """Queue the merge past the API, which may be dead; its id."""
        options = PlanOptions(**OPTIONS).model_dump(mode="json")
        record = new_job(parse_recipe(self.recipe).to_json(), f"file://{out}", options, time.time())
        self.jobs.create(record)
        return record.id

    def wait(self, job: str, *states: JobState) -> JobRecord:
        """Wait until the job is in one of these states, or has ended."""
        wanted = {*states, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
        until(lambda: self.jobs.get(job).state in wanted, f"{job} is not {states}", 0.002)
        return self.jobs.get(job)

    def check(self, job: str, out: Path) -> JobRecord:
        """Wait for the end: it succeeded, once, and left what an undisturbed merge leaves."""
        record = self.wait(job)
        assert record.state == JobState.SUCCEEDED, record.error
        assert [entry.event for entry in record.history].count("succeeded") == 1
        assert "restarted" not in [entry.event for entry in record.history]
        assert digests(out) == self.content
        return record


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of everything below a directory."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file()
    }


class Held:
    """Locks on all uploads of an output: shared, and exclusive on those of the last shards."""

    def __init__(self, out: Path, shards: int, exclusive: int) -> None:
        found = until(lambda: self._data(out, shards), "the uploads are not open", 0.001)
        self.paths = found
        self._files = [os.open(path, os.O_RDWR) for path in found]
        for number, file in enumerate(self._files):
            fcntl.flock(file, fcntl.LOCK_EX if number >= shards - exclusive else fcntl.LOCK_SH)

    @staticmethod
    def _data(out: Path, shards: int) -> list[Path]:
        named = []
        for note in out.glob(".mergemill/uploads/*/upload.json"):
            named.append((note.read_text(), note.with_name("data")))
        return [path for _, path in sorted(named)] if len(named) == shards else []

    def let_parts_through(self) -> None:
        """Share what was exclusive: parts are uploaded, shards are not completed."""
        for file in self._files:
            fcntl.flock(file, fcntl.LOCK_SH)

    def notes(self) -> dict[Path, int]:
        """The records of uploaded parts, and when each was written: a part that is uploaded again has it anew.

        Not their inodes: the record of before is removed first, and the new one may be given its number.
        """
        found = [note for path in self.paths for note in path.parent.glob("parts/*.json")]
        return {note: note.stat().st_mtime_ns for note in found}

    def release(self) -> None:
        """Let everything happen."""
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@pytest.fixture(scope="module")
def rig(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One stack for all tests here: what they kill in it comes back."""
    root = tmp_path_factory.mktemp("durability")
    base = llama_tensors(0, layers=4, hidden=256, heads=4, vocab=12_000, dtype=torch.float32)
    write_checkpoint(root / "base", base, {"torch_dtype": "float32"}, shard_bytes=MIB)
    write_checkpoint(root / "one", fine_tune(base, 1, 0.01), shard_bytes=MIB)
    recipe = {
        "merge_method": "ties",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / "one")}],
        "parameters": {"density": 0.5},
    }
    chosen: dict[str, Any] = {
        "namespace": f"test-{uuid.uuid4().hex}",
        "lease_seconds": LEASE_S,
        "poll_seconds": 0.1,
        "progress_seconds": 0.2,
        "max_parts_in_flight": 1,
    }
    with (
        EmbeddedStack(root / "stack", redis_url=valkey_url, ray_cpus=1, **chosen) as stack,
        JobStore(valkey_url, chosen["namespace"]) as jobs,
    ):
        made = Rig(stack, jobs, Settings(redis_url=valkey_url, **chosen), recipe)
        job = made.submit(root / "undisturbed")
        assert made.wait(job).state == JobState.SUCCEEDED, made.jobs.get(job).error
        made.content = digests(root / "undisturbed")
        yield made


@pytest.fixture
def shards(rig: Rig) -> int:
    """How many shards the merge makes."""
    found = sum(name.endswith(".safetensors") for name in rig.content)
    assert found > 2
    return found


def process_below(root: int, mark: bytes) -> int:
    """The one process below another whose command line begins with, or holds as a word, ``mark``."""
    parents = {process.pid: process.parent for process in processes()}

    def is_below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    found = []
    for pid in parents:
        if is_below(pid) and pid != root:
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            if line.startswith(mark) or mark in line.split(b"\0"):
                found.append(pid)
    return max(found, default=0)


def victim_pid(rig: Rig, victim: str) -> int:
    """Process id of a part of the stack."""
    schedule = rig.stack.pids["schedule"]
    match victim:
        case "worker":
            label = b"ray::model."  # a worker is named for the tensors that it merges
            return int(until(lambda: process_below(schedule, label), "no worker is at work"))
        case "ray driver":
            # The warden has the same words on its command line, and is its parent.
            return int(until(lambda: process_below(schedule, b"service.cluster.fleet"), "no driver is there"))
        case _:
            return rig.stack.pids[victim]


def kill(pid: int) -> None:
    """End a process as a power cut does, and wait until it is gone."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: pid not in {process.pid for process in processes()}, f"{pid} is still there")


@pytest.mark.parametrize("victim", ["worker", "schedule", "ray driver", "serve"])
def test_a_kill_in_the_middle_of_a_part(rig: Rig, shards: int, tmp_path: Path, victim: str) -> None:
    """The part was read and merged, and is kept from being uploaded; some before it are finished."""
    job = rig.submit(tmp_path / "out")
    with Held(tmp_path / "out", shards, exclusive=1) as held:
        worker = victim_pid(rig, "worker")
        last = held.paths[-1].parent
        until(lambda: list(last.glob("parts/*.lock")), "no part waits to be uploaded")
        before = rig.jobs.parts(job)
        finished = held.notes()
        assert len(before) == len(finished) > 1
        kill(worker if victim == "worker" else victim_pid(rig, victim))
        held.let_parts_through()
        assert rig.wait(job, JobState.COMMITTING).state == JobState.COMMITTING
        after = held.notes()
        assert {note: after[note] for note in finished} == finished  # none of them was uploaded again
        assert len(after) == rig.jobs.get(job).parts_total > len(finished)
    record = rig.check(job, tmp_path / "out")
    parts = rig.jobs.parts(job)
    assert {part: parts[part] for part in before} == before
    assert len(parts) == record.parts_total
    # The stack's socket accepts while the API starts again, so the answer may take as long as that.
    headers = bearer(rig.stack.api_key)
    seen = httpx.get(f"{rig.stack.url}/v1/merges/{job}", timeout=DEADLINE_S, headers=headers).json()
    assert seen["state"] == "succeeded"


@pytest.mark.parametrize("victim", ["schedule", "ray driver"])
def test_a_kill_in_the_middle_of_the_commit(rig: Rig, shards: int, tmp_path: Path, victim: str) -> None:
    job = rig.submit(tmp_path / "out")
    with Held(tmp_path / "out", shards, exclusive=0) as held:
        assert rig.wait(job, JobState.COMMITTING).state == JobState.COMMITTING
        finished, owner = held.notes(), rig.jobs.status(job).owner
        kill(victim_pid(rig, victim))
        if victim == "schedule":
            until(lambda: rig.jobs.status(job).owner not in {owner, None}, "nobody takes the job over")
        assert rig.jobs.get(job).state == JobState.COMMITTING
        assert held.notes() == finished
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    rig.check(job, tmp_path / "out")


@pytest.mark.parametrize("victim", ["schedule", "ray driver"])
def test_a_kill_while_planning(rig: Rig, tmp_path: Path, victim: str) -> None:
    pid = victim_pid(rig, victim)
    job = rig.submit(tmp_path / "out")
    rig.wait(job, JobState.PLANNING)
    kill(pid)
    events = [entry.event for entry in rig.jobs.get(job).history]
    assert events[:2] == ["created", "planning_started"]
    if victim == "schedule":
        assert "uploads_opened" not in events
    rig.check(job, tmp_path / "out")


def test_another_scheduler_takes_over_from_one_that_sleeps(rig: Rig, shards: int, tmp_path: Path) -> None:
    """And the sleeper, when it wakes, has lost its lease, does no harm and works on."""
    job = rig.submit(tmp_path / "out")
    sleeper = rig.stack.pids["schedule"]
    with JobStore(rig.settings.redis_url, rig.settings.namespace) as jobs:
        other = Scheduler(rig.settings, jobs, LocalDriver())  # type: ignore[arg-type]
        thread = threading.Thread(target=other.run)
        with Held(tmp_path / "out", shards, exclusive=1) as held:
            last = held.paths[-1].parent
            until(lambda: list(last.glob("parts/*.lock")), "no part waits to be uploaded")
            finished = held.notes()
            before = rig.jobs.status(job)
            os.kill(sleeper, signal.SIGSTOP)
            try:
                thread.start()
                until(
                    lambda: rig.jobs.status(job).owner not in {before.owner, None},
                    "nobody takes the job over",
                )
                held.let_parts_through()
                assert rig.wait(job, JobState.COMMITTING).state == JobState.COMMITTING
                after = held.notes()
                assert {note: after[note] for note in finished} == finished
                held.release()
                record = rig.check(job, tmp_path / "out")
                other.stop()
                thread.join()
            finally:
                os.kill(sleeper, signal.SIGCONT)
    second = rig.submit(tmp_path / "second")
    rig.check(second, tmp_path / "second")
    assert rig.stack.pids["schedule"] == sleeper
    assert rig.jobs.get(job) == record
    # Stopped within a write of its progress, it finishes that when it wakes: hidden, and nobody's any more.
    late = {name for name in digests(tmp_path / "out") if name.startswith(".mergemill/")}
    assert late <= {".mergemill/progress-00000.json"}
    assert {k: v for k, v in digests(tmp_path / "out").items() if k not in late} == rig.content


def test_a_cancel_over_rest_is_heard_until_the_commit_begins(rig: Rig, shards: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job = rig.submit(out)
    with Held(out, shards, exclusive=1) as held:
        until(lambda: list(held.paths[-1].parent.glob("parts/*.lock")), "no part waits to be uploaded")
        cancel, headers = f"{rig.stack.url}/v1/merges/{job}/cancel", bearer(rig.stack.api_key)
        assert httpx.post(cancel, headers=headers).status_code == 202
        held.release()  # the worker may get on with its part: there is no upload for it any more
        assert rig.wait(job).state == JobState.CANCELLED
        assert not out.exists() or not any(out.iterdir())
    job = rig.submit(out)
    with Held(out, shards, exclusive=0):
        assert rig.wait(job, JobState.COMMITTING).state == JobState.COMMITTING
        refused = httpx.post(f"{rig.stack.url}/v1/merges/{job}/cancel", headers=headers)
        assert refused.status_code == 409
        assert refused.headers["content-type"] == "application/problem+json"
    rig.check(job, out)
