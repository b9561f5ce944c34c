"""What a terminal is shown while a job is waited for."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from mergemill.jobs import Job, Progress
from mergemill.show import byte_progress, error_lines, job_progress, price_table, state_text
from workers.errors import JobFailedError, PlanError, RecipeError, StoreError

pytestmark = pytest.mark.fast


def job(state: str, **progress: int) -> Job:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    return Job("merge-1", state, "s3://b/o", at, at, False, Progress(**progress), None, {})


def shown(*jobs: Job, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, legacy_windows=False)
    with job_progress(console) as show:
        for look in jobs:
            show(look)
    return out.getvalue()


def test_a_terminal_sees_state_bytes_and_survives_an_unknown_total() -> None:
    steps = [
        job("queued"),
        job("running", bytes_total=2_000_000_000, surveys_done=1, surveys_total=4),
        job("running", bytes_done=500_000_000, bytes_total=2_000_000_000, surveys_done=4, surveys_total=4),
        job("succeeded", bytes_done=2_000_000_000, bytes_total=2_000_000_000),
    ]
    assert "2.0/2.0 GB" in shown(*steps, terminal=True)
    assert state_text(steps[1]) == "running, survey 1 of 4"


def test_lines_come_when_something_has_changed_and_not_before() -> None:
    looks = [
        job("running", bytes_done=done, bytes_total=1000) for done in (0, 0, 99, 100, 101, 555, 999, 1000)
    ]
    assert shown(*looks, looks[-1], terminal=False).splitlines() == [
        "merge-1 running",
        "merge-1 running 10 % 100 B of 1.00 kB",
        "merge-1 running 50 % 555 B of 1.00 kB",
        "merge-1 running 90 % 999 B of 1.00 kB",
        "merge-1 running 100 % 1.00 kB of 1.00 kB",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_downloads_show_bytes_even_when_there_are_none(terminal: bool) -> None:
    out = io.StringIO()
    with byte_progress(Console(file=out, force_terminal=terminal, width=100), "merge-1") as show:
        show(0, 0)
        show(5, 10)
    assert "merge-1" in out.getvalue()


def failed(cause: Exception) -> JobFailedError:
    error = JobFailedError("merge-1 failed: why")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (RecipeError("one"), ["error: one"]),
        (PlanError("one", "two"), ["error: 2 problems:", "  - one", "  - two"]),
        (StoreError("gone"), ["error: gone"]),
        (failed(PlanError("one", "two")), ["error: 2 problems:", "  - one", "  - two"]),
        (failed(StoreError("gone")), ["error: merge-1 failed: why"]),
        (JobFailedError("merge-1 was cancelled"), ["error: merge-1 was cancelled"]),
    ],
)
def test_errors_name_every_problem(error: Exception, lines: list[str]) -> None:
    assert list(error_lines(error)) == lines


def test_a_price_tells_of_surveys_where_there_are_some() -> None:
    price: dict[str, Any] = {
        "bytes_read": 3, "bytes_written": 5, "input_bytes": 7, "requests": 11, "shards": 1, "parts": 13,
        "survey_tasks": 17, "surveyed_tensors": 19, "most_reads": 23, "peak_bytes": 29, "worst": "[w]",
    }  # fmt: skip
    plan = {"price": price, "tensors": 31, "shards": [{}], "digest": "d", "notices": ["mind this"]}
    out = io.StringIO()
    Console(file=out, width=200).print(price_table(plan))
    surveyed = "17, for 19 tensors read up to 23 times"
    for expected in (
        "3 B (the inputs hold 7 B)", "11", "13", surveyed, "29 B a worker at most, for [w]", "31", "mind this"
    ):  # fmt: skip
        assert expected in out.getvalue()
    price["survey_tasks"] = 0
    out = io.StringIO()
    Console(file=out, width=200).print(price_table(plan))
    assert "survey" not in out.getvalue()
