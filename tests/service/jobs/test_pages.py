"""Pages of jobs: progress and record of one moment, and cursors that nobody else could have made."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.jobs.jobstore import JobStore
from service.jobs.pages import page_of, read_cursor, write_cursor
from service.jobs.record import JobState, new_job_id
from service.jobs.transitions import Cancelled, CancelRequested
from tests.service.job_steps import TO_RUNNING, fresh, part
from workers.errors import CursorError

pytest_plugins = ["tests.servers.valkey"]


@pytest.mark.valkey
def test_a_page_tells_of_each_job_what_its_status_does(job_store: JobStore) -> None:
    untouched, begun, over = (fresh(1000.0 + n) for n in range(3))
    for record in (untouched, begun, over):
        job_store.create(record)
    for record in (begun, over):
        lease = job_store.acquire(record.id, f"owner of {record.id}", 60)
        assert lease is not None
        for event in TO_RUNNING:
            job_store.apply(record.id, event, lease.token)
        job_store.record_survey(lease, "survey", 0, {"threshold": 1.0}, 70)
        job_store.record_part(lease, part(1, 1000))
    job_store.record_part(lease, part(2, 500))
    for event in (CancelRequested(), Cancelled()):
        job_store.apply(over.id, event, lease.token)
    job_store.release(lease)

    page = job_store.list(10)
    assert page.statuses == tuple(job_store.status(record.id) for record in (over, begun, untouched))
    counted = [(s.parts_done, s.bytes_done, s.bytes_read, s.surveys_done) for s in page.statuses]
    assert counted == [(2, 1500, 4570, 1), (1, 1000, 3070, 1), (0, 0, 0, 0)]
    assert [s.owner for s in page.statuses] == [None, f"owner of {begun.id}", None]
    assert job_store.list(10, state=JobState.RUNNING).statuses == page.statuses[1:2]


@pytest.mark.fast
def test_one_row_too_many_is_the_next_page() -> None:
    records = [fresh(1000.0 + n) for n in range(3)]
    rows = [(record.model_dump_json(), 0, (None, None), 0, None) for record in records]
    assert page_of(rows, 3).cursor is None
    page = page_of(rows, 2)
    assert page.records == tuple(records[:2])
    assert page.cursor is not None
    assert read_cursor(page.cursor) == records[1].id
    assert page_of([], 2).statuses == ()


@pytest.mark.fast
@given(st.floats(0, 2e9))
def test_cursors_come_back(now: float) -> None:
    job = new_job_id(now)
    assert read_cursor(write_cursor(job)) == job


@pytest.mark.fast
@given(st.one_of(st.text(), st.binary().map(lambda data: base64.urlsafe_b64encode(data).decode())))
def test_nothing_else_is_a_cursor(text: str) -> None:
    with pytest.raises(CursorError, match="not one that a page gave out"):
        read_cursor(text)
