"""The transition table, every state by every event, and what no sequence of events may break."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.jobs.record import HISTORY_LIMIT, JOB_ID, JobRecord, JobState, new_job, new_job_id
from service.jobs.transitions import (
    DETAIL_CHARS,
    Cancelled,
    CancelRequested,
    CommitStarted,
    Event,
    Failed,
    GivingUp,
    Planned,
    PlanningStarted,
    Restarted,
    ShardCompleted,
    Succeeded,
    UploadsOpened,
    advance,
    event_name,
)
from tests.service.job_steps import ALL_COMPLETE, ERROR, PATHS, PLANNED, SAMPLES, TO_RUNNING, UPLOADS, fresh
from workers.errors import IllegalTransitionError

pytestmark = pytest.mark.fast

# By hand, from the design: where each event (down) leads from each state (across). A dash is illegal.
#                       queued    planning   running    committing  succeeded failed  cancelled
EXPECTED = {
    "planning_started": "planning  planning   -          -           -         -       -",
    "planned":          "-         planning   -          -           -         -       -",
    "uploads_opened":   "-         running    -          -           -         -       -",
    "restarted":        "-         -          planning   planning    -         -       -",
    "commit_started":   "-         -          committing -           -         -       -",
    "shard_completed":  "-         -          -          committing  -         -       -",
    "succeeded":        "-         -          -          -           -         -       -",
    "giving_up":        "-         -          running    committing  -         -       -",
    "failed":           "failed    failed     failed     failed      -         -       -",
    "cancel_requested": "cancelled planning   running    -           -         -       cancelled",
    "cancelled":        "-         -          -          -           -         -       -",
}  # fmt: skip


def follow(record: JobRecord, *events: Event) -> JobRecord:
    for event in events:
        record = advance(record, event, record.updated_at + 1)
    return record


def at(state: JobState) -> JobRecord:
    return follow(fresh(), *PATHS[state])


@pytest.mark.parametrize("state", JobState)
@pytest.mark.parametrize("event", SAMPLES, ids=event_name)
def test_every_event_in_every_state(state: JobState, event: Event) -> None:
    expected = dict(zip(JobState, EXPECTED[event_name(event)].split(), strict=True))[state]
    record = at(state)
    assert record.state is state
    if expected == "-":
        with pytest.raises(IllegalTransitionError) as caught:
            advance(record, event, 2000)
        for entry in record.history:
            assert f"{entry.event} -> {entry.state}" in "".join(caught.value.__notes__)
        assert record.id in str(caught.value)
        assert "History" not in str(caught.value)
    else:
        assert advance(record, event, 2000).state == expected


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (JobState.SUCCEEDED, "already succeeded"),
        (JobState.FAILED, "already failed"),
        (JobState.COMMITTING, "is committing its output"),
    ],
)
def test_a_cancel_that_comes_too_late_is_told_so_in_words(state: JobState, said: str) -> None:
    record = at(state)
    with pytest.raises(IllegalTransitionError) as caught:
        advance(record, CancelRequested(), 2000)
    assert str(caught.value) == f"{record.id} {said}; it cannot be cancelled any more"


def test_the_table_above_names_every_event() -> None:
    assert {event_name(event) for event in SAMPLES} == set(EXPECTED)


def test_the_first_reason_to_give_up_is_the_one_that_is_told() -> None:
    record = advance(at(JobState.RUNNING), GivingUp(ERROR), 2000)
    assert record.giving_up == ERROR
    assert record.error is None
    assert advance(record, GivingUp({**ERROR, "detail": "another"}), 2001) is record
    assert advance(record, Failed(ERROR), 2002).error == ERROR


def test_success_needs_every_shard() -> None:
    committing = at(JobState.COMMITTING)
    half = follow(committing, ALL_COMPLETE[0])
    with pytest.raises(IllegalTransitionError, match=r"1 of its shards are not complete, model-00002"):
        advance(half, Succeeded(), 0)
    done = follow(half, ALL_COMPLETE[1], Succeeded({"bytes": 7}))
    assert done.state is JobState.SUCCEEDED
    assert done.summary == {"bytes": 7}
    assert done.completed_shards == tuple(UPLOADS)


def test_a_shard_of_another_plan_cannot_complete() -> None:
    with pytest.raises(IllegalTransitionError, match="no shard model-00009"):
        advance(at(JobState.COMMITTING), ShardCompleted("model-00009-of-00009.safetensors"), 0)


def test_a_shard_completes_once() -> None:
    once = follow(at(JobState.COMMITTING), ALL_COMPLETE[0])
    assert advance(once, ALL_COMPLETE[0], 9e9) is once


def test_uploads_need_a_plan_and_are_not_empty() -> None:
    planning = follow(fresh(), PlanningStarted())
    with pytest.raises(IllegalTransitionError, match="no plan yet"):
        advance(planning, UploadsOpened(UPLOADS), 0)
    with pytest.raises(IllegalTransitionError, match="no upload was opened"):
        advance(follow(planning, PLANNED), UploadsOpened({}), 0)


def test_the_commit_loses_against_an_earlier_cancel() -> None:
    asked = follow(at(JobState.RUNNING), CancelRequested())
    assert asked.cancel_requested
    with pytest.raises(IllegalTransitionError, match="cancel it first"):
        advance(asked, CommitStarted(), 0)
    assert follow(asked, Cancelled()).state is JobState.CANCELLED


def test_the_cancel_loses_against_an_earlier_commit() -> None:
    with pytest.raises(IllegalTransitionError, match="is committing its output"):
        advance(at(JobState.COMMITTING), CancelRequested(), 0)


@pytest.mark.parametrize("state", [JobState.PLANNING, JobState.RUNNING, JobState.CANCELLED])
def test_cancelling_twice_changes_nothing(state: JobState) -> None:
    record = at(state) if state is JobState.CANCELLED else follow(at(state), CancelRequested())
    assert advance(record, CancelRequested(), 9e9) is record


def test_a_job_that_nobody_cancelled_is_not_cancelled() -> None:
    with pytest.raises(IllegalTransitionError, match="nobody asked"):
        advance(at(JobState.RUNNING), Cancelled(), 0)


def test_a_cancelled_queued_job_never_had_uploads() -> None:
    record = at(JobState.CANCELLED)
    assert record.cancel_requested
    assert (record.uploads, record.attempt) == ({}, 0)


@pytest.mark.parametrize("state", [JobState.RUNNING, JobState.COMMITTING])
def test_a_restart_forgets_the_plan_and_all_that_came_of_it(state: JobState) -> None:
    begun = at(state) if state is JobState.RUNNING else follow(at(state), ALL_COMPLETE[0])
    record = advance(begun, Restarted("the plan is another one now"), 2000)
    untouched = {"id", "recipe", "output", "options", "created_at", "cancel_requested"}
    expected = fresh().model_copy(update={name: getattr(begun, name) for name in untouched})
    changed = {
        "state": JobState.PLANNING,
        "version": begun.version + 1,
        "attempt": 2,
        "updated_at": 2000,
        "history": record.history,
    }
    assert record == expected.model_copy(update=changed)
    assert record.history[-1].detail == "the plan is another one now"


def test_planning_again_after_a_crash_counts_and_forgets_the_unused_plan() -> None:
    record = follow(fresh(), PlanningStarted(), PLANNED, PlanningStarted())
    assert record.attempt == 2
    assert record.plan_digest is None
    assert record.price is None


def test_a_plan_is_recorded_field_by_field() -> None:
    record = follow(fresh(), PlanningStarted(), Planned("c" * 64, 3, {"p": 2}, ("n", "m"), 11, 13, 17))
    assert record.plan_digest == "c" * 64
    assert (record.semantics_version, record.price, record.notices) == (3, {"p": 2}, ("n", "m"))
    assert (record.bytes_total, record.parts_total, record.surveys_total) == (11, 13, 17)
    assert follow(record, UploadsOpened(UPLOADS)).uploads == UPLOADS


def test_a_failure_keeps_its_error_and_a_short_history() -> None:
    record = follow(at(JobState.RUNNING), Failed({"type": "FleetError", "detail": "x" * 10_000}))
    assert record.error == {"type": "FleetError", "detail": "x" * 10_000}
    assert len(record.history[-1].detail) == DETAIL_CHARS
    assert record.history[-1].detail.startswith("xxx")


def test_time_never_runs_backwards() -> None:
    record = advance(fresh(now=1000.0), PlanningStarted(), 900.0)
    assert record.updated_at == 1000.0
    assert record.history[-1].at == 1000.0


def test_the_history_keeps_the_first_entry_and_the_latest() -> None:
    record = fresh()
    for _ in range(300):
        record = follow(record, PlanningStarted())
    assert len(record.history) == HISTORY_LIMIT
    assert record.history[0].event == "created"
    assert [entry.detail for entry in record.history[1:]] == [f"attempt {n}" for n in range(202, 301)]


@given(st.lists(st.sampled_from([*SAMPLES, *ALL_COMPLETE, *TO_RUNNING]), max_size=40), st.randoms())
def test_no_sequence_of_events_breaks_a_record(events: list[Event], clock: random.Random) -> None:
    record = fresh()
    for event in events:
        before = record.model_dump_json()
        now = clock.uniform(0, 5000)
        try:
            after = advance(record, event, now)
        except IllegalTransitionError:
            after = record
        assert record.model_dump_json() == before
        if record.state.is_terminal:
            assert after is record
        if after is not record:
            assert after.version == record.version + 1
            assert after.updated_at >= record.updated_at
            assert after.history[-1].event == event_name(event)
            assert after.cancel_requested or not record.cancel_requested
        record = after
        check_invariants(record)


def check_invariants(record: JobRecord) -> None:
    past_planning = record.state in {JobState.RUNNING, JobState.COMMITTING, JobState.SUCCEEDED}
    assert JobRecord.model_validate_json(record.model_dump_json()) == record
    assert record.history[-1].state is record.state
    assert record.history[0].event == "created"
    assert len(record.history) <= HISTORY_LIMIT
    assert set(record.completed_shards) <= set(record.uploads)
    assert len(set(record.completed_shards)) == len(record.completed_shards)
    if record.state in {JobState.QUEUED, JobState.PLANNING}:
        assert record.uploads == {}
    if past_planning:
        assert record.uploads
        assert record.plan_digest
    if record.state in {JobState.COMMITTING, JobState.SUCCEEDED}:
        assert not record.cancel_requested
    if record.state is JobState.SUCCEEDED:
        assert set(record.completed_shards) == set(record.uploads)
    assert (record.error is not None) == (record.state is JobState.FAILED)
    assert (record.summary is not None) == (record.state is JobState.SUCCEEDED)
    assert record.cancel_requested or record.state is not JobState.CANCELLED


def test_ids_sort_by_time_and_differ_within_a_millisecond() -> None:
    times = [0.0, 0.001, 1.0, 1_700_000_000.0, 1_700_000_000.001, 2**47 / 1000]
    ids = [new_job_id(now) for now in times]
    assert ids == sorted(ids)
    assert all(JOB_ID.fullmatch(job) for job in ids)
    assert len({new_job_id(5.0) for _ in range(1000)}) == 1000


def test_an_id_begins_with_the_time_as_a_ulid_does() -> None:
    # The ULID specification's example: 01ARZ3NDEKTSV4RRFFQ69G5FAV was made at 1469922850259 ms
    assert new_job_id(1469922850.259)[:16] == "merge-01arz3ndek"


@pytest.mark.parametrize(
    "bad", ["", "merge-", "merge-../../x", "merge-" + "i" * 26, "xmerge-00000000z8ph917p6yj78qtwx7"]
)
def test_other_ids_are_refused(bad: str) -> None:
    with pytest.raises(ValidationError, match="id"):
        JobRecord(id=bad, recipe={}, output="file:///o", created_at=0, updated_at=0)


def test_records_are_frozen_and_know_their_fields() -> None:
    record = fresh()
    with pytest.raises(ValidationError, match="frozen"):
        record.state = JobState.FAILED  # type: ignore[misc]
    with pytest.raises(ValidationError, match="surprise"):
        JobRecord.model_validate({**record.model_dump(), "surprise": 1})


def test_a_record_does_not_share_the_callers_dicts() -> None:
    recipe, options, uploads = {"a": 1}, {"b": 2}, dict(UPLOADS)
    record = follow(
        new_job(recipe, "file:///o", options, 0), PlanningStarted(), PLANNED, UploadsOpened(uploads)
    )
    recipe["a"], options["b"] = 9, 9
    uploads.clear()
    assert (record.recipe, record.options, record.uploads) == ({"a": 1}, {"b": 2}, UPLOADS)


def test_final_states() -> None:
    assert {state for state in JobState if state.is_terminal} == {"succeeded", "failed", "cancelled"}


def test_while_parts_are_made_only_shards_that_nobody_sees_are_completed() -> None:
    hidden = f".mergemill/stage-{'0' * 32}-model-00001-of-00001.safetensors"
    running = at(JobState.RUNNING).model_copy(update={"uploads": {**UPLOADS, hidden: "c"}})
    assert advance(running, ShardCompleted(hidden), 0).completed_shards == (hidden,)
    with pytest.raises(IllegalTransitionError, match=r"no shard model-00001.* to complete yet"):
        advance(running, ShardCompleted(next(iter(UPLOADS))), 0)
    with pytest.raises(IllegalTransitionError, match="1 of its shards are not complete"):
        follow(running, CommitStarted(), *ALL_COMPLETE, Succeeded({}))
