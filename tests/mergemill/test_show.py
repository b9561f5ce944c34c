"""What a terminal is shown while a job is waited for."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from mergemill import show
from mergemill.jobs import Job
from mergemill.show import byte_progress, error_lines, job_lines, job_progress, price_table, state_text
from service.jobs.progress import Progress
from workers.errors import JobFailedError, PlanError, RecipeError, StoreError

pytestmark = pytest.mark.fast


def job(state: str, price: dict[str, Any] | None = None, **progress: int) -> Job:
    at = datetime(2026, 1, 1, tzinfo=UTC)
    body = {"price": price, "recipe": {"merge_method": "ties"}}
    after = at + timedelta(seconds=3725.4)
    return Job("merge-1", state, "s3://b/o", at, after, False, Progress(**progress), None, body)


def shown(*jobs: Job, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, legacy_windows=False)
    with job_progress(console) as tell:
        for look in jobs:
            tell(look)
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
        "merge-1 running 10 % 100 B of 1.00 kB written",
        "merge-1 running 55 % 555 B of 1.00 kB written",
        "merge-1 running 99 % 999 B of 1.00 kB written",
        "merge-1 running 100 % 1.00 kB of 1.00 kB written",
    ]


SURVEYED = {"bytes_read": 3000, "requests": 17, "peak_bytes": 700_000_000}


def test_surveys_are_progress_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most bytes of a merge with surveys are read before any is written."""

    def look(read: int, done: int, surveys: int, state: str = "running") -> Job:
        told = {"bytes_read": read, "bytes_done": done, "surveys_done": surveys}
        return job(state, SURVEYED, bytes_total=1000, surveys_total=2, **told)

    looks = [look(0, 0, 0), look(1000, 0, 1), look(2000, 0, 2), look(2500, 500, 2), look(2500, 1000, 2)]
    assert [each.percent for each in looks] == [0, 25, 50, 75, 87]
    assert shown(*looks[:4], look(2500, 1000, 2, "committing"), terminal=False).splitlines() == [
        "merge-1 running",
        "merge-1 running, survey 1 of 2 25 % 1.00 kB of 3.00 kB read, 0 B of 1.00 kB written",
        "merge-1 running 50 % 2.00 kB of 3.00 kB read, 0 B of 1.00 kB written",
        "merge-1 running 75 % 2.50 kB of 3.00 kB read, 500 B of 1.00 kB written",
        "merge-1 committing",
    ]
    assert look(2500, 1000, 2, "committing").percent == 100  # a pass of a survey was needless
    assert "2.0/4.0 kB" in shown(*looks[:3], terminal=True)
    clock = iter(range(0, 1000, 10))
    # The module's own: time.monotonic itself is the clock of every event loop of this process.
    monkeypatch.setattr(show, "monotonic", lambda: next(clock))
    assert len(shown(*[look(10 * read, 0, 0) for read in range(4)], terminal=False).splitlines()) > 1


def test_a_job_is_told_in_full() -> None:
    ended = job("succeeded", SURVEYED, bytes_total=1000, bytes_done=1000, bytes_read=2500, surveys_done=2,
                surveys_total=2, parts_done=3, parts_total=3)  # fmt: skip
    assert list(job_lines(ended)) == [
        "merge-1  succeeded",
        "  method    ties",
        "  output    s3://b/o",
        "  created   2026-01-01 00:00:00 UTC",
        "  ended     2026-01-01 01:02:05 UTC, after 1:02:05",
        "  surveys   2 of 2 passes",
        "  read      2.50 kB of at most 3.00 kB",
        "  written   1.00 kB of 1.00 kB, 3 of 3 parts",
        "  price     17 requests to the stores, 700 MB of memory a worker at most",
    ]
    half = job("running", SURVEYED, bytes_total=1000, bytes_read=2000)
    assert "  done      50 % of what is read and written" in list(job_lines(half))
    assert (str(half), str(ended), str(job("queued"))) == (
        "merge-1 running 50 %", "merge-1 succeeded", "merge-1 queued"
    )  # fmt: skip


@pytest.mark.parametrize("terminal", [True, False])
def test_downloads_show_bytes_even_when_there_are_none(terminal: bool) -> None:
    out = io.StringIO()
    with byte_progress(Console(file=out, force_terminal=terminal, width=100), "merge-1") as tell:
        tell(0, 0)
        tell(5, 10)
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
        "arena_bytes": 37, "gpu_bytes": 0,
    }  # fmt: skip
    plan = {"price": price, "tensors": 31, "shards": [{}], "digest": "d", "notices": ["mind this"]}
    out = io.StringIO()
    Console(file=out, width=200).print(price_table(plan))
    surveyed = "17, for 19 tensors read up to 23 times"
    for expected in (
        "at most 3 B (the inputs hold 7 B)", "11", "13", surveyed, "31", "mind this",
        "29 B a worker at most: 37 B of it for tensors, the most for [w]; the rest",
    ):  # fmt: skip
        assert expected in out.getvalue()
    assert "GPU" not in out.getvalue()
    price |= {"survey_tasks": 0, "gpu_bytes": 41}
    out = io.StringIO()
    Console(file=out, width=200).print(price_table(plan))
    assert "survey" not in out.getvalue()
    assert "41 B a worker at most" in out.getvalue()
