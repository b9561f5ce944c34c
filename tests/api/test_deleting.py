"""``DELETE /v1/merges/{id}``: jobs that have ended can be forgotten, others cannot."""

from __future__ import annotations

import time

import httpx
import pytest

from service.jobs.jobstore import JobStore
from service.jobs.record import JobState
from service.jobs.transitions import Cancelled, CancelRequested, PlanningStarted
from tests.service.held_jobs import claimed
from tests.service.job_steps import PATHS

pytestmark = pytest.mark.valkey


def ended(store: JobStore, state: JobState) -> str:
    """A job that has ended, with nobody at it."""
    events = PATHS[state]
    if state == JobState.CANCELLED:
        record, lease = claimed(store)
        store.apply(record.id, CancelRequested())
    else:
        record, lease = claimed(store, *events)
    store.release(lease)
    return record.id


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED])
def test_a_job_that_has_ended_is_forgotten(api: httpx.Client, job_store: JobStore, state: JobState) -> None:
    job, other = ended(job_store, state), ended(job_store, state)
    answer = api.delete(f"/v1/merges/{job}")
    assert (answer.status_code, answer.content) == (204, b"")
    for path in ("", "/events", "/deliveries", "/files"):
        assert api.get(f"/v1/merges/{job}{path}").status_code == 404
    assert [found["id"] for found in api.get("/v1/merges").json()["jobs"]] == [other]
    assert [found["id"] for found in api.get(f"/v1/merges?state={state}").json()["jobs"]] == [other]
    again = api.delete(f"/v1/merges/{job}")
    assert (again.status_code, again.json()["type"]) == (404, "urn:mergemill:error:job_not_found")


@pytest.mark.parametrize("state", [JobState.QUEUED, JobState.PLANNING, JobState.RUNNING, JobState.COMMITTING])
def test_a_job_that_goes_on_is_not(api: httpx.Client, job_store: JobStore, state: JobState) -> None:
    record, lease = claimed(job_store, *PATHS[state])
    job_store.release(lease)
    answer = api.delete(f"/v1/merges/{record.id}")
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:mergemill:error:illegal_transition")
    assert f"is {state}: cancel it" in answer.json()["detail"]
    assert job_store.get(record.id).state == state


def test_a_job_that_is_still_cleared_up_is_not(api: httpx.Client, job_store: JobStore) -> None:
    record, lease = claimed(job_store, PlanningStarted())
    job_store.apply(record.id, CancelRequested())
    job_store.apply(record.id, Cancelled(left="the store stalls"), lease.token)
    job_store.release(lease)
    answer = api.delete(f"/v1/merges/{record.id}")
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:mergemill:error:conflict")
    assert job_store.get(record.id).history[-1].at <= time.time()
