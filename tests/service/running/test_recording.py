"""Parts that are recorded together, and a record's version: against a real Valkey."""

from __future__ import annotations

import pytest

from service.jobs.jobstore import JobStore
from service.jobs.record import JobState, new_job_id
from service.jobs.transitions import CancelRequested
from tests.service.held_jobs import claimed, lose
from tests.service.job_steps import PATHS, TO_RUNNING, part
from workers.errors import ConflictError, LeaseLostError

pytestmark = pytest.mark.valkey


def test_parts_of_one_step_count_once_each(job_store: JobStore) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    assert job_store.record_part(lease, part(1, 1000), part(2, 7)) == 2
    assert job_store.record_part(lease, part(2, 8), part(3, 10**15), part(3, 5)) == 1
    assert job_store.record_part(lease, part(1, 1), part(2, 1)) == 0
    found = {each.part: each for each in (part(1, 1000), part(2, 7), part(3, 10**15))}
    assert job_store.parts(record.id) == found
    status = job_store.status(record.id)
    read = sum(each.bytes_read for each in found.values())
    assert (status.parts_done, status.bytes_done, status.bytes_read) == (3, 1007 + 10**15, read)


def test_a_thousand_parts_are_one_step(job_store: JobStore) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    assert job_store.record_part(lease, *(part(number, number) for number in range(1, 1025))) == 1024
    assert job_store.status(record.id).bytes_done == 1024 * 1025 // 2


@pytest.mark.parametrize("state", [state for state in JobState if state is not JobState.RUNNING])
def test_of_parts_that_come_too_late_none_is_recorded(job_store: JobStore, state: JobState) -> None:
    record, lease = claimed(job_store, *PATHS[state])
    with pytest.raises(ConflictError, match=f"the job is {state}"):
        job_store.record_part(lease, part(1), part(2))
    assert job_store.parts(record.id) == {}


def test_a_former_owner_records_none_of_its_parts(job_store: JobStore) -> None:
    record, lease = claimed(job_store, *TO_RUNNING)
    lose(job_store, lease)
    with pytest.raises(LeaseLostError):
        job_store.record_part(lease, part(1), part(2))
    assert job_store.parts(record.id) == {}


def test_a_version_tells_whether_the_record_has_changed(job_store: JobStore) -> None:
    record, _ = claimed(job_store, *TO_RUNNING)
    assert job_store.version(record.id) == record.version
    after = job_store.apply(record.id, CancelRequested())
    assert job_store.version(record.id) == after.version == record.version + 1
    assert job_store.version(new_job_id(1.0)) is None
