"""The job store when several write at once, owners are paused, answers get lost, and the server is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pytest

from service.jobs import jobstore
from service.jobs.jobstore import JobStore, Lease
from service.jobs.record import JobState
from service.jobs.transitions import (
    Cancelled,
    CancelRequested,
    CommitStarted,
    Planned,
    PlanningStarted,
    Restarted,
    ShardCompleted,
    UploadsOpened,
)
from service.valkey import EmbeddedValkey
from tests.processes import running as process
from tests.servers.redis_proxy import AnswerLosingProxy
from tests.service.held_jobs import claimed
from tests.service.job_steps import TO_RUNNING, fresh, part
from workers.errors import IllegalTransitionError, JobStoreUnavailableError, LeaseLostError

pytestmark = pytest.mark.valkey

THREADS = 8
T = TypeVar("T")


def running(store: JobStore) -> Lease:
    """The lease of a job of our own that is running."""
    return claimed(store, *TO_RUNNING)[1]


def at_once(*acts: Callable[[], T]) -> list[T | Exception]:
    """What the acts return or raise when they begin together, a thread each."""
    gate = threading.Barrier(len(acts))

    def act(body: Callable[[], T]) -> T | Exception:
        gate.wait(30)
        try:
            return body()
        except Exception as error:  # noqa: BLE001 - the tests look at it
            return error

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(act, acts))


def until(condition: Callable[[], T | None], seconds: float = 30) -> T:
    """Wait for something to be true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)
    return found


# Several at once


def test_one_of_many_gets_the_lease(job_store: JobStore) -> None:
    for _ in range(10):
        record = fresh(time.time())
        job_store.create(record)
        leases = at_once(*[lambda job=record.id: job_store.acquire(job, "me", 60)] * THREADS)
        assert sum(isinstance(lease, Lease) for lease in leases) == 1
        assert leases.count(None) == THREADS - 1


def test_every_job_is_claimed_by_one(job_store: JobStore) -> None:
    records = [fresh(1000.0 + n) for n in range(40)]
    for record in records:
        job_store.create(record)

    def claim_all() -> list[Lease]:
        mine = []
        while found := job_store.claim_next(threading.current_thread().name, 60):
            assert found[0].id == found[1].job
            mine.append(found[1])
        return mine

    claimed = [lease for mine in at_once(*[claim_all] * THREADS) if isinstance(mine, list) for lease in mine]
    assert sorted(lease.job for lease in claimed) == [record.id for record in records]
    assert len({lease.token for lease in claimed}) == 40


def test_no_event_is_lost(job_store: JobStore) -> None:
    shards = [f"model-{n:05}-of-00008.safetensors" for n in range(THREADS)]
    record = fresh(time.time())
    job_store.create(record)
    lease = job_store.acquire(record.id, "owner", 60)
    assert lease is not None
    plan, uploads = Planned("d" * 64, 1, {}, (), 1, 1), UploadsOpened(dict.fromkeys(shards, "upload"))
    for event in (PlanningStarted(), plan, uploads, CommitStarted()):
        job_store.apply(record.id, event, lease.token)
    complete = [
        lambda shard=shard: job_store.apply(record.id, ShardCompleted(shard), lease.token) for shard in shards
    ]
    answers = at_once(*complete)
    after = job_store.get(record.id)
    assert sorted(after.completed_shards) == shards, answers
    assert after.version == 5 + THREADS
    assert [entry.detail for entry in after.history[-THREADS:]] == list(after.completed_shards)


def test_either_the_cancel_or_the_commit_wins(job_store: JobStore) -> None:
    for _ in range(25):
        lease = running(job_store)
        answers = at_once(
            lambda lease=lease: job_store.apply(lease.job, CancelRequested()),
            lambda lease=lease: job_store.apply(lease.job, CommitStarted(), lease.token),
        )
        (refused,) = [answer for answer in answers if isinstance(answer, Exception)]
        assert isinstance(refused, IllegalTransitionError)
        record = job_store.get(lease.job)
        committing = record.state is JobState.COMMITTING
        assert committing is not record.cancel_requested
        assert isinstance(answers[0], Exception) is committing


def test_a_part_recorded_by_many_counts_once(job_store: JobStore) -> None:
    lease = running(job_store)
    answers = at_once(*[lambda: job_store.record_part(lease, part(1, 1000))] * THREADS)
    assert sorted(map(str, answers)) == ["0"] * (THREADS - 1) + ["1"]
    assert job_store.status(lease.job).bytes_done == 1000


# A paused owner

OWNER = """
import itertools, json, sys
from service.jobs.transitions import CommitStarted, Failed
from service.jobs.jobstore import JobStore
from tests.service.job_steps import TO_RUNNING, part
from workers.errors import LeaseLostError

url, namespace, job, ttl_s = sys.argv[1:]
with JobStore(url, namespace) as store:
    lease = store.acquire(job, "paused", float(ttl_s))
    for event in TO_RUNNING:
        store.apply(job, event, lease.token)
    store.claim_output(lease, "file:///output")
    try:
        for number in itertools.count(1):
            store.renew(lease)
            store.record_part(lease, part(number))
            print(number, flush=True)
    except LeaseLostError:
        pass
    outcome = {}
    for name, act in {
        "apply": lambda: store.apply(job, CommitStarted(), lease.token),
        "fail": lambda: store.apply(job, Failed({"type": "x", "detail": "y"}), lease.token),
        "part": lambda: store.record_part(lease, part(10**9)),
        "survey": lambda: store.record_survey(lease, "s", 0, {}, 1),
        "renew": lambda: store.renew(lease),
        "claim": lambda: store.claim_output(lease, "file:///another"),
        "unclaim": lambda: store.release_output(lease, "file:///output"),
        "release": lambda: store.release(lease),
    }.items():
        try:
            outcome[name] = repr(act())
        except LeaseLostError:
            outcome[name] = "lost"
    print(json.dumps(outcome), flush=True)
"""
"""A scheduler that records parts for as long as its lease lets it, and then tries all else."""


@pytest.mark.parametrize("progress", [1, 7])
def test_an_owner_paused_past_its_lease_can_record_nothing(
    job_store: JobStore, valkey_url: str, valkey_namespace: str, progress: int
) -> None:
    record = fresh(time.time())
    job_store.create(record)
    command = [sys.executable, "-c", OWNER, valkey_url, valkey_namespace, record.id, "2.5"]
    root = Path(__file__).parents[3]
    with process(command, stdout=subprocess.PIPE, text=True, cwd=root) as owner:
        assert owner.stdout is not None
        try:
            for number in range(1, progress + 1):
                assert owner.stdout.readline() == f"{number}\n"
            owner.send_signal(signal.SIGSTOP)
            state = Path(f"/proc/{owner.pid}/stat")
            until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
            paused_at = time.monotonic()
            found = until(lambda: job_store.claim_next("successor", 60))
            assert time.monotonic() - paused_at < 10
            lease = found[1]
            parts, status = job_store.parts(record.id), job_store.status(record.id)
            assert len(parts) >= progress
            owner.send_signal(signal.SIGCONT)
            *_, last = owner.stdout.read().splitlines()
        finally:
            owner.kill()
    names = ("apply", "fail", "part", "survey", "renew", "claim", "unclaim")
    assert json.loads(last) == dict.fromkeys(names, "lost") | {"release": "None"}
    assert job_store.parts(record.id) == parts
    assert job_store.status(record.id) == status
    assert status.owner == "successor"
    job_store.claim_output(lease, "file:///output")
    assert job_store.apply(record.id, CommitStarted(), lease.token).state is JobState.COMMITTING


# Lost answers


@pytest.fixture
def lossy(valkey_url: str, valkey_namespace: str) -> Iterator[tuple[JobStore, AnswerLosingProxy]]:
    """A store behind a proxy that loses answers, and the proxy."""
    address = urlsplit(valkey_url)
    assert address.hostname
    assert address.port
    proxy = AnswerLosingProxy(address.hostname, address.port)
    with JobStore(valkey_url.replace(f":{address.port}/", f":{proxy.port}/"), valkey_namespace) as store:
        yield store, proxy
    proxy.close()


@pytest.mark.parametrize("times", [1, 2])
def test_a_lost_answer_changes_nothing(
    lossy: tuple[JobStore, AnswerLosingProxy], job_store: JobStore, times: int
) -> None:
    store, proxy = lossy
    record, younger = fresh(1000.0), fresh(1001.0)
    job_store.create(younger)

    def losing(act: Callable[[], T]) -> T:
        proxy.lose, proxy.lost = times, 0
        answer = act()
        assert proxy.lost == times
        return answer

    losing(lambda: store.create(record))
    found = losing(lambda: store.claim_next("me", 60))
    assert found is not None
    assert found[0] == record
    lease = found[1]
    assert job_store.status(younger.id).owner is None
    other = losing(lambda: store.acquire(younger.id, "me", 60))
    assert other is not None
    job_store.renew(other)
    for event in (*TO_RUNNING, CommitStarted()):
        after = losing(lambda event=event: store.apply(record.id, event, lease.token))
    assert after == job_store.get(record.id)
    assert after.version == 5
    losing(lambda: store.renew(lease))
    losing(lambda: store.claim_output(lease, "file:///o"))
    losing(lambda: store.release_output(lease, "file:///o"))
    losing(lambda: store.release(lease))
    assert job_store.status(record.id).owner is None


def test_a_lost_answer_does_not_count_a_part_twice(
    lossy: tuple[JobStore, AnswerLosingProxy], job_store: JobStore
) -> None:
    store, proxy = lossy
    lease = running(job_store)
    proxy.lose = 1
    store.record_part(lease, part(1, 1000))
    assert proxy.lost == 1
    assert job_store.status(lease.job).bytes_done == 1000


def test_a_lost_answer_is_found_behind_somebody_elses_write(
    lossy: tuple[JobStore, AnswerLosingProxy], job_store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, proxy = lossy
    lease = running(job_store)
    lost = proxy._may_lose

    def lose_and_cancel() -> bool:
        if lose := lost():
            job_store.apply(lease.job, CancelRequested())
        return lose

    monkeypatch.setattr(proxy, "_may_lose", lose_and_cancel)
    proxy.lose = 1
    restarted = store.apply(lease.job, Restarted("why not"), lease.token)
    assert restarted.state is JobState.PLANNING
    assert not restarted.cancel_requested
    record = job_store.get(lease.job)
    assert record.attempt == 2  # and not refused as a restart of a job that is planning
    assert record.cancel_requested
    assert job_store.apply(lease.job, Cancelled(), lease.token).state is JobState.CANCELLED


# A killed server


def test_nothing_acknowledged_is_lost_with_the_server(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server, JobStore(server.url) as store:
        lease = running(store)
        store.record_survey(lease, "s", 0, {"threshold": 0.1}, 5)
        store.claim_output(lease, "file:///o")
        acknowledged: list[int] = []
        stop = threading.Event()

        def write(first: int) -> None:
            for number in range(first, 1_000_000, 4):
                if stop.is_set():
                    return
                store.record_part(lease, part(number, number))
                acknowledged.append(number)

        with ThreadPoolExecutor(4) as pool:
            writers = [pool.submit(write, first) for first in range(1, 5)]
            try:
                until(lambda: len(acknowledged) > 100)
                server._process.kill()
                server._process.wait()
                before = len(acknowledged)
                with EmbeddedValkey(tmp_path, server.port) as again:
                    assert again.url == server.url
                    until(lambda: len(acknowledged) > before + 100)  # the writers never noticed
                    stop.set()
                    for writer in writers:
                        writer.result(60)
                    parts = store.parts(lease.job)
                    assert sorted(result.number for result in parts.values()) == sorted(acknowledged)
                    assert store.get(lease.job).state is JobState.RUNNING
                    assert store.surveys(lease.job) == {("s", 0): {"threshold": 0.1}}
                    status = store.status(lease.job)
                    assert status.bytes_done == sum(acknowledged)
                    assert status.owner == "owner"
                    store.renew(lease)
            finally:
                stop.set()


def test_a_server_that_stays_away_is_our_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobstore, "CONNECTION_TRIES", 2)
    with EmbeddedValkey(tmp_path) as server, JobStore(server.url) as store:
        lease = running(store)
        server.stop()
        acts: list[Callable[[], object]] = [
            store.ping,
            store.durability_warnings,
            lambda: store.create(fresh()),
            lambda: store.get(lease.job),
            lambda: store.status(lease.job),
            lambda: store.list(1),
            lambda: store.apply(lease.job, CancelRequested()),
            lambda: store.claim_next("me", 1),
            lambda: store.record_part(lease, part(1)),
        ]
        for act in acts:
            with pytest.raises(JobStoreUnavailableError, match="job store: ConnectionError"):
                act()


def test_a_lease_is_still_lost_after_a_restart(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server, JobStore(server.url) as store:
        lease = running(store)
        store.release(lease)
        assert store.acquire(lease.job, "successor", 60) is not None
        server._process.kill()
        server._process.wait()
        with EmbeddedValkey(tmp_path, server.port), pytest.raises(LeaseLostError):
            store.record_part(lease, part(1))
