"""The job store against a real Valkey: what each method promises, one caller at a time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis

from service import jobstore
from service.jobs import (
    Cancelled,
    CancelRequested,
    CommitStarted,
    Event,
    Failed,
    JobRecord,
    JobState,
    PlanningStarted,
    Restarted,
    UploadsOpened,
    new_job_id,
)
from service.jobstore import JobStore, Lease
from tests.service.job_steps import ERROR, PATHS, PLANNED, TO_COMMITTING, TO_RUNNING, UPLOADS, fresh, part
from workers.errors import (
    ConflictError,
    IllegalTransitionError,
    JobNotFoundError,
    JobStoreUnavailableError,
    LeaseLostError,
    OutputConflictError,
)

pytest_plugins = ["tests.servers.valkey"]
pytestmark = pytest.mark.valkey

Raw = redis.Redis


@pytest.fixture
def raw(valkey_url: str) -> object:
    """A bare connection, to look behind the store's back."""
    with redis.Redis.from_url(valkey_url, decode_responses=True) as client:
        yield client


def claimed(store: JobStore, *events: Event, ttl_s: float = 60) -> tuple[JobRecord, Lease]:
    """A job of our own that the events have happened to."""
    record = fresh(time.time())
    store.create(record)
    lease = store.acquire(record.id, "owner", ttl_s)
    assert lease is not None
    for event in events:
        record = store.apply(record.id, event, lease.token)
    return record, lease


def lose(store: JobStore, lease: Lease) -> Lease:
    """Let the lease run out, and somebody else take the job."""
    store.release(lease)
    other = store.acquire(lease.job, "usurper", 60)
    assert other is not None
    return other


# Records


@pytest.mark.parametrize("state", JobState)
def test_a_record_comes_back_as_it_was(job_store: JobStore, state: JobState) -> None:
    record, _ = claimed(job_store, *PATHS[state])
    assert record.state is state
    assert job_store.get(record.id) == record
    assert job_store.list(9, state=state).records == (record,)
    assert [other for other in JobState if job_store.list(9, state=other).records] == [state]


def test_an_id_is_created_once(job_store: JobStore) -> None:
    record = fresh()
    job_store.create(record)
    with pytest.raises(ConflictError, match=record.id):
        job_store.create(record.model_copy(update={"output": "file:///elsewhere"}))
    assert job_store.get(record.id) == record


def test_a_record_may_be_created_in_any_state(job_store: JobStore) -> None:
    done, lease = claimed(job_store, *PATHS[JobState.SUCCEEDED])
    record = done.model_copy(update={"id": new_job_id(1.0)})
    job_store.release(lease)
    job_store.create(record)
    assert job_store.get(record.id) == record
    assert job_store.list(9, state=JobState.SUCCEEDED).records == (done, record)
    assert job_store.claim_next("me", 60) is None


@pytest.mark.parametrize(
    "bad", ["", "x", "{id}:parts", "{id}:writes", "{id}\n", "*", "merge-00000000z8ph917p6yj78qtwx7"]
)
def test_unknown_ids_are_not_found(job_store: JobStore, bad: str) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    job_store.record_part(lease, part(1))
    bad = bad.format(id=record.id)
    calls: list[Callable[[], object]] = [
        lambda: job_store.get(bad),
        lambda: job_store.status(bad),
        lambda: job_store.apply(bad, CancelRequested()),
        lambda: job_store.acquire(bad, "me", 1),
    ]
    for call in calls:
        with pytest.raises(JobNotFoundError):
            call()


def test_namespaces_do_not_see_each_other(job_store: JobStore, valkey_url: str) -> None:
    record, _ = claimed(job_store)
    with JobStore(valkey_url, "test-another") as other:
        with pytest.raises(JobNotFoundError):
            other.get(record.id)
        assert other.claim_next("me", 1) is None


def test_illegal_events_change_nothing(job_store: JobStore) -> None:
    record, lease = claimed(job_store, PlanningStarted())
    with pytest.raises(IllegalTransitionError, match="planning_started"):
        job_store.apply(record.id, CommitStarted(), lease.token)
    assert job_store.get(record.id) == record


def test_an_event_that_changes_nothing_still_needs_the_lease(job_store: JobStore) -> None:
    shard = PATHS[JobState.SUCCEEDED][4]
    record, lease = claimed(job_store, *TO_COMMITTING, shard)
    assert job_store.apply(record.id, shard, lease.token) == record
    lose(job_store, lease)
    with pytest.raises(LeaseLostError):
        job_store.apply(record.id, shard, lease.token)


def test_only_a_cancel_needs_no_lease(job_store: JobStore) -> None:
    record = fresh()
    job_store.create(record)
    with pytest.raises(ValueError, match="PlanningStarted needs the token"):
        job_store.apply(record.id, PlanningStarted())
    assert job_store.apply(record.id, CancelRequested()).state is JobState.CANCELLED


def test_the_clock_is_the_callers(valkey_url: str, valkey_namespace: str) -> None:
    with JobStore(valkey_url, valkey_namespace, clock=lambda: 4102444800.25) as store:
        record, _ = claimed(store, PlanningStarted())
    assert record.updated_at == record.history[-1].at == 4102444800.25


def interfering(*acts: Callable[[], object]) -> tuple[Callable[[], float], list[float]]:
    """A clock that first does something else, one act a call: between the store's read and its write."""
    left: list[Callable[[], object]] = list(acts)
    asked: list[float] = []

    def clock() -> float:
        if left:
            left.pop(0)()
        asked.append(time.time())
        return asked[-1]

    return clock, asked


def test_a_write_in_between_is_built_upon(
    job_store: JobStore, valkey_url: str, valkey_namespace: str
) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    clock, asked = interfering(lambda: job_store.apply(record.id, CancelRequested()))
    with JobStore(valkey_url, valkey_namespace, clock=clock) as store:
        after = store.apply(record.id, Failed(ERROR), lease.token)
    assert after == job_store.get(record.id)
    assert [entry.event for entry in after.history[-2:]] == ["cancel_requested", "failed"]
    assert after.version == record.version + 2
    assert len(asked) == 2


def test_a_cancel_in_between_wins_over_the_commit(
    job_store: JobStore, valkey_url: str, valkey_namespace: str
) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    clock, _ = interfering(lambda: job_store.apply(record.id, CancelRequested()))
    with (
        JobStore(valkey_url, valkey_namespace, clock=clock) as store,
        pytest.raises(IllegalTransitionError, match="cancel it first"),
    ):
        store.apply(record.id, CommitStarted(), lease.token)
    assert job_store.apply(record.id, Cancelled(), lease.token).state is JobState.CANCELLED


def test_endless_interference_is_a_conflict(
    job_store: JobStore, valkey_url: str, valkey_namespace: str
) -> None:
    record, lease = claimed(job_store)
    again = [lambda: job_store.apply(record.id, PlanningStarted(), lease.token)] * 99
    clock, asked = interfering(*again)
    with (
        JobStore(valkey_url, valkey_namespace, clock=clock) as store,
        pytest.raises(ConflictError, match=record.id),
    ):
        store.apply(record.id, Failed(ERROR), lease.token)
    assert len(asked) == jobstore.CONFLICT_TRIES
    assert job_store.get(record.id).attempt == jobstore.CONFLICT_TRIES


def test_a_lease_lost_between_read_and_write_is_noticed(
    job_store: JobStore, valkey_url: str, valkey_namespace: str
) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    clock, asked = interfering(lambda: lose(job_store, lease))
    with JobStore(valkey_url, valkey_namespace, clock=clock) as store, pytest.raises(LeaseLostError):
        store.apply(record.id, CommitStarted(), lease.token)
    assert len(asked) == 1
    assert job_store.get(record.id) == record


# Pages


def test_pages_are_newest_first_and_end(job_store: JobStore) -> None:
    records = [fresh(1000.0 + n) for n in range(7)]
    for record in records[::2] + records[1::2]:
        job_store.create(record)
    first = job_store.list(3)
    second = job_store.list(3, first.cursor)
    third = job_store.list(3, second.cursor)
    assert [*first.records, *second.records, *third.records] == records[::-1]
    assert third.cursor is None
    assert job_store.list(7).cursor is None
    assert job_store.list(6).cursor is not None


def test_an_empty_store_has_an_empty_page(job_store: JobStore) -> None:
    page = job_store.list(10)
    assert (page.records, page.cursor) == ((), None)


@pytest.mark.parametrize("state", [None, JobState.CANCELLED])
def test_jobs_that_come_while_paging_neither_repeat_nor_hide_others(
    job_store: JobStore, state: JobState | None
) -> None:
    old = [fresh(1000.0 + n) for n in range(25)]
    for record in old:
        job_store.create(record)
    for record in old[::2]:
        job_store.apply(record.id, CancelRequested())
    wanted = [record.id for record in (old if state is None else old[::2])][::-1]
    seen, cursor, now = [], None, 2000.0
    while True:
        page = job_store.list(4, cursor, state)
        seen += [record.id for record in page.records]
        assert len(page.records) == 4 or page.cursor is None
        if page.cursor is None:
            break
        cursor = page.cursor
        for _ in range(3):
            newer = fresh(now := now + 1)
            job_store.create(newer)
            job_store.apply(newer.id, CancelRequested())
    assert seen == wanted


@pytest.mark.parametrize("cursor", ["", "!", "abc", "bWVyZ2Ut", "é", "a" * 5])
def test_foreign_cursors_are_refused(job_store: JobStore, cursor: str) -> None:
    with pytest.raises(ValueError, match="cursor"):
        job_store.list(10, cursor)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_page_has_room_for_one_job(job_store: JobStore, limit: int) -> None:
    with pytest.raises(ValueError, match="limit"):
        job_store.list(limit)


# Leases


def test_the_oldest_free_unfinished_job_is_next(job_store: JobStore) -> None:
    records = [fresh(1000.0 + n) for n in range(4)]
    for record in reversed(records):
        job_store.create(record)
    job_store.apply(records[0].id, CancelRequested())
    held = job_store.acquire(records[1].id, "other", 60)
    assert held is not None
    found = job_store.claim_next("me", 60)
    assert found is not None
    assert found[0] == records[2]
    assert (found[1].job, found[1].owner, found[1].ttl_s) == (records[2].id, "me", 60)
    job_store.release(held)
    assert [job_store.claim_next("me", 60) is not None for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("state", JobState)
def test_jobs_in_every_unfinished_state_can_be_claimed(job_store: JobStore, state: JobState) -> None:
    record, lease = claimed(job_store, *PATHS[state])
    job_store.release(lease)
    found = job_store.claim_next("me", 60)
    assert (None if found is None else found[0]) == (None if state.is_terminal else record)


def test_a_lease_has_one_holder_until_it_is_released(job_store: JobStore) -> None:
    record, lease = claimed(job_store)
    assert job_store.status(record.id).owner == "owner"
    assert job_store.acquire(record.id, "other", 60) is None
    job_store.release(lease)
    assert job_store.status(record.id).owner is None
    other = job_store.acquire(record.id, "other", 60)
    assert other is not None
    job_store.release(lease)  # not ours any more
    assert job_store.status(record.id).owner == "other"


def test_a_lease_expires_and_a_renewed_one_lasts(job_store: JobStore, raw: Raw) -> None:
    _, kept = claimed(job_store, ttl_s=60)
    record, lease = claimed(job_store, ttl_s=0.05)
    key = f"{job_store._namespace}:job:{kept.job}:lease"
    raw.pexpire(key, 1000)
    job_store.renew(kept)
    assert 50_000 < int(raw.pttl(key)) <= 60_000
    deadline = time.monotonic() + 10
    while job_store.acquire(record.id, "other", 60) is None:
        assert time.monotonic() < deadline
    with pytest.raises(LeaseLostError):
        job_store.renew(lease)


def test_tokens_differ_even_when_redis_forgets(job_store: JobStore, raw: Raw) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    epoch, _, counter = lease.token.partition(":")
    assert len(epoch) == 16
    raw.delete(f"{job_store._namespace}:leases", f"{job_store._namespace}:job:{record.id}:lease")
    again = job_store.acquire(record.id, "other", 60)
    assert again is not None
    assert again.token.partition(":")[2] == counter == "1"
    assert again.token != lease.token
    with pytest.raises(LeaseLostError):
        job_store.renew(lease)


FENCED: dict[str, Callable[[JobStore, Lease], object]] = {
    "apply": lambda store, lease: store.apply(lease.job, CommitStarted(), lease.token),
    "an illegal event": lambda store, lease: store.apply(lease.job, Cancelled(), lease.token),
    "cancel": lambda store, lease: store.apply(lease.job, CancelRequested(), lease.token),
    "renew": lambda store, lease: store.renew(lease),
    "record_part": lambda store, lease: store.record_part(lease, part(2)),
    "record_survey": lambda store, lease: store.record_survey(lease, "s", 0, {}, 1),
    "claim_output": lambda store, lease: store.claim_output(lease, "file:///b"),
    "release_output": lambda store, lease: store.release_output(lease, "file:///a"),
}
"""Everything that can be done with a lease, but to release it."""


@pytest.mark.parametrize("held_by", ["usurper", None])
@pytest.mark.parametrize("act", FENCED)
def test_a_lost_lease_can_do_nothing(job_store: JobStore, raw: Raw, act: str, held_by: str | None) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    job_store.record_part(lease, part(1))
    job_store.claim_output(lease, "file:///a")
    other = lose(job_store, lease)
    if held_by is None:
        job_store.release(other)
    before = {key: raw.dump(key) for key in raw.keys(f"{job_store._namespace}:*")}
    with pytest.raises(LeaseLostError, match=record.id):
        FENCED[act](job_store, lease)
    job_store.release(lease)
    assert {key: raw.dump(key) for key in raw.keys(f"{job_store._namespace}:*")} == before


def test_the_same_acts_with_a_good_lease_do_something(job_store: JobStore) -> None:
    for act in set(FENCED) - {"an illegal event"}:
        record, lease = claimed(job_store, *TO_RUNNING)
        FENCED[act](job_store, lease)
        assert job_store.get(record.id).state in {JobState.RUNNING, JobState.COMMITTING}
        job_store.apply(record.id, Failed(ERROR), lease.token)


# Finished work


def test_a_part_counts_once(job_store: JobStore) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    assert job_store.record_part(lease, part(1, 1000))
    assert not job_store.record_part(lease, part(1, 1000))
    assert job_store.record_part(lease, part(2, 7))
    assert job_store.parts(record.id) == {found.part: found for found in (part(1, 1000), part(2, 7))}
    status = job_store.status(record.id)
    assert (status.parts_done, status.bytes_done, status.bytes_read) == (2, 1007, 3021)


def test_the_first_result_of_a_part_stays(job_store: JobStore) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    first, second = part(1, 1000), part(1, 1001)
    job_store.record_part(lease, first)
    assert not job_store.record_part(lease, second)
    assert job_store.parts(record.id) == {first.part: first}
    assert job_store.status(record.id).bytes_done == 1000


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.RUNNING])
def test_parts_belong_to_running_jobs(job_store: JobStore, state: JobState) -> None:
    record, lease = claimed(job_store, *PATHS[state])
    with pytest.raises(ConflictError, match=f"the job is {state}"):
        job_store.record_part(lease, part(1))
    assert job_store.parts(record.id) == {}


def test_surveys_come_back_exactly_and_count_once(job_store: JobStore) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    facts = {"threshold": 0.1 + 0.2, "tiny": 5e-324, "norms": [1 / 3, 2**53 + 1], "none": None}
    assert job_store.record_survey(lease, "a:b", 0, facts, 40)
    assert not job_store.record_survey(lease, "a:b", 0, {}, 40)
    assert job_store.record_survey(lease, "a:b", 1, {}, 2)
    assert job_store.surveys(record.id) == {("a:b", 0): facts, ("a:b", 1): {}}
    status = job_store.status(record.id)
    assert (status.surveys_done, status.bytes_read, status.bytes_done) == (2, 42, 0)


def test_a_restart_forgets_what_was_done_in_the_same_step(job_store: JobStore) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    job_store.record_part(lease, part(1))
    job_store.record_survey(lease, "s", 0, {}, 1)
    after = job_store.apply(record.id, Restarted("another plan"), lease.token)
    status = job_store.status(record.id)
    assert status == jobstore.JobStatus(after, 0, 0, 0, 0, "owner")
    assert job_store.parts(record.id) == {}
    assert job_store.surveys(record.id) == {}
    with pytest.raises(ConflictError, match="the job is planning"):  # a straggler of the old plan
        job_store.record_part(lease, part(2))
    for event in (PLANNED, UploadsOpened(UPLOADS)):
        job_store.apply(record.id, event, lease.token)
    assert job_store.record_part(lease, part(1))


def test_other_events_forget_nothing(job_store: JobStore) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    job_store.record_part(lease, part(1))
    job_store.apply(record.id, CommitStarted(), lease.token)
    assert job_store.status(record.id).parts_done == 1
    planning, other = claimed(job_store, PlanningStarted())
    job_store.record_survey(other, "s", 0, {}, 1)
    job_store.apply(planning.id, PlanningStarted(), other.token)
    assert job_store.status(planning.id).surveys_done == 1


# Outputs


def test_an_output_has_one_unfinished_job(job_store: JobStore) -> None:
    (first, lease), (second, other) = claimed(job_store), claimed(job_store)
    job_store.claim_output(lease, "s3://b/out")
    job_store.claim_output(lease, "s3://b/out")
    with pytest.raises(OutputConflictError, match=first.id):
        job_store.claim_output(other, "s3://b/out")
    job_store.claim_output(other, "s3://b/elsewhere")
    job_store.release_output(other, "s3://b/out")  # not its claim
    with pytest.raises(OutputConflictError):
        job_store.claim_output(other, "s3://b/out")
    job_store.release_output(lease, "s3://b/out")
    job_store.claim_output(other, "s3://b/out")
    with pytest.raises(OutputConflictError, match=second.id):
        job_store.claim_output(lease, "s3://b/out")


def test_the_claim_outlives_the_lease(job_store: JobStore) -> None:
    (_, lease), (_, other) = claimed(job_store), claimed(job_store)
    job_store.claim_output(lease, "s3://b/out")
    successor = lose(job_store, lease)
    with pytest.raises(OutputConflictError):
        job_store.claim_output(other, "s3://b/out")
    job_store.claim_output(successor, "s3://b/out")


def test_a_finished_job_claims_nothing(job_store: JobStore) -> None:
    (record, lease), (_, other) = claimed(job_store), claimed(job_store)
    job_store.claim_output(lease, "s3://b/out")
    job_store.apply(record.id, Failed(ERROR), lease.token)  # and its scheduler dies before it can release
    job_store.claim_output(other, "s3://b/out")
    job_store.release_output(lease, "s3://b/out")
    with pytest.raises(OutputConflictError):
        job_store.claim_output(claimed(job_store)[1], "s3://b/out")


# The server


def test_the_embedded_server_is_durable(job_store: JobStore) -> None:
    job_store.ping()
    assert job_store.durability_warnings() == ()


def test_each_careless_setting_is_named(job_store: JobStore, raw: Raw) -> None:
    careless = {"appendonly": "no", "appendfsync": "everysec", "maxmemory-policy": "allkeys-lru"}
    good = {name: raw.config_get(name)[name] for name in careless}
    try:
        for name, value in careless.items():
            raw.config_set(name, value)
            assert job_store.durability_warnings() == (f"Redis has {name} {value}, not {good[name]}",)
            raw.config_set(name, good[name])
    finally:
        for name, value in good.items():
            raw.config_set(name, value)


def test_a_redis_that_hides_its_settings_is_said_to(raw: Raw, valkey_url: str) -> None:
    raw.acl_setuser("limited", enabled=True, passwords=["+pw"], keys=["*"], commands=["+@all", "-config"])
    try:
        with JobStore(valkey_url.replace("//:", "//limited:").replace(password(valkey_url), "pw")) as store:
            (warning,) = store.durability_warnings()
    finally:
        raw.acl_deluser("limited")
    assert "does not tell" in warning
    assert "appendonly yes" in warning


def password(url: str) -> str:
    return url.partition("//:")[2].partition("@")[0]


def test_an_old_redis_is_named(job_store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobstore, "OLDEST_REDIS", (99, 1))
    (warning,) = job_store.durability_warnings()
    assert "is older than 99.1" in warning


def test_a_wrong_password_is_our_own_error(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobstore, "CONNECTION_TRIES", 0)
    url = valkey_url.replace(password(valkey_url), "wrong")
    with JobStore(url) as store, pytest.raises(JobStoreUnavailableError, match=r"WRONGPASS|password"):
        store.ping()


def test_a_key_of_another_kind_is_our_own_error(job_store: JobStore, raw: Raw) -> None:
    record, _ = claimed(job_store)
    raw.set(f"{job_store._namespace}:job:{record.id}:parts", "not a hash")
    with pytest.raises(JobStoreUnavailableError, match="WRONGTYPE"):
        job_store.status(record.id)


def test_scripts_survive_their_flushing(job_store: JobStore, raw: Raw) -> None:
    claimed(job_store, PlanningStarted())
    raw.script_flush()
    record, _ = claimed(job_store, PlanningStarted())
    assert job_store.get(record.id).attempt == 1


def test_every_key_is_in_the_table(job_store: JobStore, raw: Raw) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    job_store.record_part(lease, part(1))
    job_store.record_survey(lease, "s", 0, {}, 1)
    job_store.claim_output(lease, "file:///out")
    keys = {key.removeprefix(f"{job_store._namespace}:") for key in raw.keys(f"{job_store._namespace}:*")}
    shown = {key.replace(record.id, "<id>").replace("file:///out", "<uri>") for key in keys}
    assert len(shown) == 11
    for key in shown:
        assert f"``{key.replace('running', '<state>')}``" in (jobstore.__doc__ or "")
