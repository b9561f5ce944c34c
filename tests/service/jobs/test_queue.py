"""Whose turn it is: priorities, fairness across keys, and limits that hold whatever dies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.jobs.jobstore import JobStore, Lease
from service.jobs.ownjobs import OwnJobs
from service.jobs.record import JobRecord, JobState
from service.jobs.transitions import Cancelled, CancelRequested, Failed, PlanningStarted
from service.keys import Limits, Scope, new_key
from service.keystore import KeyStore
from service.valkey import EmbeddedValkey
from tests.service.job_steps import ERROR, PATHS, fresh
from workers.errors import JobNotFoundError, TooManyRequestsError

pytestmark = pytest.mark.valkey

A, B, C = "a" * 12, "b" * 12, "c" * 12
_seconds = count(1000)


def queue(store: JobStore, key: str | None, priority: int = 0, most: int = 0) -> JobRecord:
    """A new job, younger than all before."""
    record = fresh(float(next(_seconds))).model_copy(update={"key": key, "priority": priority})
    store.create(record, most_queued=most)
    return record


def claim(
    store: JobStore, most: int = 0, most_of_key: int = 0, ttl_s: float = 60
) -> tuple[str, Lease] | None:
    """The next job and its lease."""
    found = store.claim_next("me", ttl_s, most, most_of_key)
    return None if found is None else (found[0].id, found[1])


def drain(store: JobStore, most: int = 0) -> list[str]:
    """Every job in the order in which it is claimed, none of which ends."""
    found = []
    while (got := claim(store, most)) is not None:
        found.append(got[0])
    return found


def ids(*records: JobRecord) -> list[str]:
    return [record.id for record in records]


def test_the_key_with_the_fewest_running_is_next_and_each_key_goes_in_order(job_store: JobStore) -> None:
    a1, a2, a3, a4 = (queue(job_store, A) for _ in range(4))
    b1, b2 = (queue(job_store, B) for _ in range(2))
    none = queue(job_store, None)
    assert drain(job_store) == ids(a1, b1, none, a2, b2, a3, a4)


def test_priority_comes_first_across_keys_and_within_one(job_store: JobStore) -> None:
    a1, a2, low = queue(job_store, A), queue(job_store, A), queue(job_store, A, -100)
    b1, urgent = queue(job_store, B), queue(job_store, B, 100)
    c1, c2 = queue(job_store, C, 1), queue(job_store, C)
    # then whoever has fewest: a has none, b and c have one each, of which b's is the older
    assert drain(job_store) == ids(urgent, c1, a1, a2, b1, c2, low)


def test_only_leases_in_force_count(job_store: JobStore) -> None:
    a1, a2 = queue(job_store, A), queue(job_store, A)
    b1 = queue(job_store, B)
    assert (claim(job_store, ttl_s=0.05) or "")[0] == a1.id
    status = job_store.status(a1.id)
    deadline = time.monotonic() + 10
    while status.owner is not None:
        assert time.monotonic() < deadline
        status = job_store.status(a1.id)
    # its scheduler died: it waits like the others, the oldest of its key
    assert drain(job_store) == ids(a1, b1, a2)


def test_jobs_that_ended_are_no_ones_turn_and_count_for_nothing(job_store: JobStore) -> None:
    a1, a2, b1, b2 = (queue(job_store, key) for key in (A, A, B, B))
    job_store.apply(a2.id, CancelRequested())  # while it waits
    _, lease = claim(job_store) or pytest.fail("a1 is there")
    job_store.apply(a1.id, PlanningStarted(), lease.token)
    job_store.apply(a1.id, Failed(ERROR), lease.token)
    job_store.release(lease)
    assert drain(job_store) == ids(b1, b2)
    assert claim(job_store) is None


def test_a_job_that_was_let_go_keeps_its_place(job_store: JobStore) -> None:
    first, second = queue(job_store, A), queue(job_store, A)
    _, lease = claim(job_store) or pytest.fail("there is one")
    job_store.apply(first.id, PlanningStarted(), lease.token)
    job_store.release(lease)
    assert drain(job_store) == ids(first, second)


def test_an_output_that_is_being_cleared_up_takes_no_jobs_place(job_store: JobStore) -> None:
    """Its job has ended, though somebody has its lease."""
    queue(job_store, A)
    held = claim(job_store)
    assert held is not None
    job_store.apply(held[0], Failed(ERROR), held[1].token)
    second = queue(job_store, A)
    found = claim(job_store, 1, 1)
    assert found is not None and found[0] == second.id
    assert claim(job_store) is None


@pytest.mark.parametrize("state", [state for state in JobState if not state.is_terminal])
def test_a_cancelled_or_failed_job_leaves_every_index(
    job_store: JobStore, raw: redis.Redis, state: JobState
) -> None:
    record = queue(job_store, A)
    lease = job_store.acquire(record.id, "me", 60)
    assert lease is not None
    for event in PATHS[state]:
        job_store.apply(record.id, event, lease.token)
    for each in JobState:
        assert (record.id in ids(*job_store.list(5, state=each, key=A).records)) == (each == state)
    if state in {JobState.PLANNING, JobState.RUNNING}:
        job_store.apply(record.id, CancelRequested())
        job_store.apply(record.id, Cancelled(), lease.token)
    else:
        job_store.apply(record.id, Failed(ERROR), lease.token)
    job_store.release(lease)
    assert raw.exists(f"{job_store._namespace}:queue:{A}") == 0
    assert raw.exists(f"{job_store._namespace}:leases:held") == 0
    assert ids(*job_store.list(5, key=A).records) == [record.id]
    assert job_store.list(5, state=state, key=A).records == ()
    assert job_store.list(5, key=B).records == ()


def test_a_limit_of_all_running_jobs(job_store: JobStore) -> None:
    records = [queue(job_store, key) for key in (A, B, C)]
    first, second = claim(job_store, 2), claim(job_store, 2)
    assert first is not None
    assert second is not None
    assert claim(job_store, 2) is None
    job_store.renew(first[1])
    assert claim(job_store, 2) is None
    job_store.release(second[1])
    again = claim(job_store, 2)
    assert again is not None
    assert again[0] == records[1].id
    assert claim(job_store, 3) is not None


def test_the_limit_holds_over_many_schedulers_at_once(job_store: JobStore) -> None:
    for number in range(60):
        queue(job_store, "abcdef"[number % 6] * 12)
    with ThreadPoolExecutor(8) as pool:
        found = [each for each in pool.map(lambda _: claim(job_store, 7, 2), range(48)) if each is not None]
    assert len(found) == len({job for job, _ in found}) == 7
    of_key: dict[str | None, int] = {}
    for job, _ in found:
        key = job_store.get(job).key
        of_key[key] = of_key.get(key, 0) + 1
    assert sorted(of_key.values()) == [1, 1, 1, 1, 1, 2]


def test_a_limit_of_each_key_and_a_keys_own(
    job_store: JobStore, valkey_url: str, valkey_namespace: str
) -> None:
    with KeyStore(valkey_url, valkey_namespace) as keys:
        own, _ = new_key("own", [Scope.SUBMIT], 0.0, limits={"running_jobs": 1})
        free, _ = new_key("free", [Scope.SUBMIT], 0.0, limits={"running_jobs": 0})
        keys.create(own)
        keys.create(free)
    for key in (A, own.id, free.id, None):
        for _ in range(4):
            queue(job_store, key)
    running: list[str | None] = []
    while (got := claim(job_store, 0, 2)) is not None:
        running.append(job_store.get(got[0]).key)
    assert {key: running.count(key) for key in set(running)} == {A: 2, own.id: 1, free.id: 4, None: 4}


def test_a_lost_answer_is_given_again_also_at_the_limit(
    job_store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(job_store, A)
    queue(job_store, A)
    monkeypatch.setattr("service.jobs.jobstore.secrets.token_hex", lambda _: "epoch")
    first, again = claim(job_store, 1), claim(job_store, 1)
    assert first is not None
    assert first == again


def test_jobs_of_a_version_without_queues_are_found(job_store: JobStore, raw: redis.Redis) -> None:
    old = [queue(job_store, key) for key in (None, A, None)]
    for name in [*raw.keys(f"{job_store._namespace}:queue*"), f"{job_store._namespace}:leases:held"]:
        raw.delete(name)
    for record in old:
        raw.hdel(f"{job_store._namespace}:job:{record.id}", "key", "rank")
    new = queue(job_store, B)
    assert sorted(drain(job_store)) == sorted(ids(*old, new))


def test_a_lease_of_a_version_without_counts_is_counted_once_it_is_renewed(
    job_store: JobStore, raw: redis.Redis
) -> None:
    queue(job_store, A)
    queue(job_store, A)
    held = claim(job_store)
    assert held is not None
    raw.delete(f"{job_store._namespace}:leases:held")
    job_store.renew(held[1])
    assert claim(job_store, 1) is None


def test_so_many_wait_and_no_more(job_store: JobStore) -> None:
    first = queue(job_store, A, most=2)
    queue(job_store, A, most=2)
    with pytest.raises(TooManyRequestsError, match="2 jobs") as caught:
        queue(job_store, A, most=2)
    assert caught.value.retry_after_s > 0
    queue(job_store, B, most=2)
    queue(job_store, A, most=0)
    lease = job_store.acquire(first.id, "me", 60)
    assert lease is not None
    job_store.apply(first.id, PlanningStarted(), lease.token)
    with pytest.raises(TooManyRequestsError):
        queue(job_store, A, most=2)
    assert len(job_store.list(10, key=A).records) == 3  # what was refused is nowhere
    queue(job_store, A, most=3)


def test_the_last_place_in_the_queue_is_taken_once(job_store: JobStore) -> None:
    def one(_: int) -> bool:
        try:
            queue(job_store, A, most=5)
        except TooManyRequestsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(one, range(24))) == 5


def test_a_page_of_one_key(job_store: JobStore) -> None:
    mine = [queue(job_store, A) for _ in range(3)]
    queue(job_store, B)
    page = job_store.list(2, key=A)
    rest = job_store.list(2, page.cursor, key=A)
    assert ids(*page.records, *rest.records) == ids(*reversed(mine))
    assert rest.cursor is None


def test_jobs_of_others_are_not_there(job_store: JobStore) -> None:
    mine, other, keyless = queue(job_store, A), queue(job_store, B), queue(job_store, None)
    key = new_key("a", [Scope.READ, Scope.SUBMIT], 0.0)[0].model_copy(update={"id": A})
    admin = key.model_copy(update={"id": C, "scopes": (Scope.ADMIN,)})
    own, everybodys = OwnJobs(job_store, key, Limits()), OwnJobs(job_store, admin, Limits())
    assert own.get(mine.id) == own.status(mine.id).record == mine
    assert ids(*own.list(9).records) == [mine.id]
    assert ids(*own.list(9, None, JobState.QUEUED).records) == [mine.id]
    missing = "merge-0" + "0" * 25
    for job in (other.id, keyless.id, missing):
        for act in (own.get, own.status, lambda job: own.apply(job, CancelRequested())):
            with pytest.raises(JobNotFoundError) as caught:
                act(job)
            assert str(caught.value) == f"there is no job {job}"
    assert job_store.get(other.id) == other
    assert len(everybodys.list(9).records) == 3
    assert everybodys.get(other.id) == other
    assert everybodys.apply(other.id, CancelRequested()).state == JobState.CANCELLED


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("queue"), st.sampled_from([A, B, None]), st.integers(-1, 1)),
        st.tuples(st.just("claim"), st.integers(0, 4), st.integers(0, 2)),
        st.tuples(st.just("release"), st.integers(0, 20)),
        st.tuples(st.just("end"), st.integers(0, 20)),
        st.tuples(st.just("die"), st.integers(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_every_claim_is_what_the_rule_says(
    job_store: JobStore, raw: redis.Redis, steps: Sequence[tuple[object, ...]]
) -> None:
    """Against the rule as it reads, over everything that can happen to jobs and their leases."""
    for name in raw.keys(f"{job_store._namespace}:*"):
        raw.delete(name)
    unfinished: dict[str, JobRecord] = {}
    held: dict[str, Lease] = {}
    for kind, *arguments in steps:
        if kind == "queue":
            record = queue(job_store, *arguments)  # type: ignore[arg-type]
            unfinished[record.id] = record
        elif kind == "claim":
            most, most_of_key = (int(str(each)) for each in arguments)

            def running(key: str | None) -> int:
                return sum(unfinished[job].key == key for job in held)

            free = [
                record
                for record in unfinished.values()
                if record.id not in held
                and (record.key is None or most_of_key == 0 or running(record.key) < most_of_key)
            ]
            full = 0 < most <= len(held)
            wanted = min(free, key=lambda r: (-r.priority, running(r.key), r.id), default=None)
            found = claim(job_store, most, most_of_key)
            assert (found[0] if found else None) == (wanted.id if wanted and not full else None)
            if found:
                held[found[0]] = found[1]
        elif kind == "cancel":
            waiting = sorted(set(unfinished) - set(held))
            if waiting:
                job = waiting[int(str(arguments[0])) % len(waiting)]
                if job_store.apply(job, CancelRequested()).state.is_terminal:
                    del unfinished[job]
        elif held:
            job = sorted(held)[int(str(arguments[0])) % len(held)]
            lease = held.pop(job)
            if kind == "die":
                raw.delete(f"{job_store._namespace}:job:{job}:lease")  # as it does when it expires
                continue
            if kind == "end":
                job_store.apply(job, Failed(ERROR), lease.token)
                del unfinished[job]
            job_store.release(lease)


@pytest.mark.parametrize("keys", [1, 100])
def test_a_claim_among_a_thousand_costs_no_more_than_among_ten(tmp_path: Path, keys: int) -> None:
    """Counted in commands of the script, which do not depend on the machine, on a server of its own."""
    with (
        EmbeddedValkey(tmp_path) as server,
        JobStore(server.url) as job_store,
        redis.Redis.from_url(server.url) as raw,
    ):
        for number in range(1000):
            queue(job_store, f"{number % keys:012}")
        held = [claim(job_store) for _ in range(8)]
        assert None not in held
        raw.config_resetstat()
        claim(job_store)
        told = raw.info("commandstats")
    calls = sum(stats["calls"] for name, stats in told.items() if name != "cmdstat_info")
    assert calls < 60 + 5 * keys, told
