"""The job store against a real Valkey: what each method promises, one caller at a time."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import redis

from service.jobs import jobstore
from service.jobs.jobstore import JobStore
from service.jobs.record import JobState, new_job_id
from service.jobs.transitions import (
    Cancelled,
    CancelRequested,
    CommitStarted,
    Failed,
    PlanningStarted,
    Restarted,
    UploadsOpened,
)
from tests.service.held_jobs import claimed, lose
from tests.service.job_steps import ERROR, PATHS, PLANNED, TO_COMMITTING, TO_RUNNING, UPLOADS, fresh, part
from workers.errors import (
    ConflictError,
    IllegalTransitionError,
    JobNotFoundError,
    LeaseLostError,
    OutputConflictError,
)

pytestmark = pytest.mark.valkey


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


def test_the_end_of_a_job_is_the_end_of_its_own_claim(
    job_store: JobStore, raw: redis.Redis, valkey_namespace: str
) -> None:
    (record, lease), (rival, other) = claimed(job_store), claimed(job_store)
    assert record.output == rival.output
    job_store.claim_output(lease, record.output)
    key = f"{valkey_namespace}:output:{record.output}"
    job_store.apply(rival.id, Failed(ERROR), other.token)
    assert raw.get(key) == record.id
    job_store.apply(record.id, Failed(ERROR), lease.token)
    assert not raw.exists(key)


def test_a_finished_job_claims_nothing(job_store: JobStore) -> None:
    (record, lease), (_, other) = claimed(job_store), claimed(job_store)
    job_store.claim_output(lease, "s3://b/out")
    job_store.apply(record.id, Failed(ERROR), lease.token)
    job_store.release(lease)  # its scheduler died before it could release the output
    job_store.claim_output(other, "s3://b/out")
    with pytest.raises(LeaseLostError):
        job_store.release_output(lease, "s3://b/out")
    with pytest.raises(OutputConflictError):
        job_store.claim_output(claimed(job_store)[1], "s3://b/out")
