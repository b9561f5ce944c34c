"""Every request has an id, in its answer, its problem and its log lines; an error that nobody expected, too."""

from __future__ import annotations

import re
import string
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.app import create_app
from api.observing import accepted
from service.jobs.jobstore import JobStore
from service.settings import Settings
from tests.api.conftest import serving

OURS = re.compile(r"[0-9a-f]{24}")
RECIPE = {"merge_method": "linear", "models": [{"model": "/a"}, {"model": "/b"}]}
GOOD = ["a", "req-1", "0b9f.x:y_z", "A" * 64]
BAD = ["", " ", "-a", "A" * 65, "a b", "a\tb", 'a"b', "a/b", "a;b", "a=b", "é", "*"]


@pytest.mark.fast
@pytest.mark.parametrize("given_id", GOOD)
def test_a_good_id_is_kept(given_id: str) -> None:
    assert accepted(given_id) == given_id


@pytest.mark.fast
@pytest.mark.parametrize("given_id", [*BAD, "a\n", "a\nb", None])
def test_any_other_is_replaced(given_id: str | None) -> None:
    assert OURS.fullmatch(accepted(given_id))


@pytest.mark.fast
@given(st.text())
def test_no_id_can_break_a_line(text: str) -> None:
    assert set(accepted(text)) <= set(string.ascii_letters + string.digits + "._:-")
    assert 0 < len(accepted(text)) <= 64


@pytest.mark.valkey
def test_an_id_is_echoed_and_in_problems(api: httpx.Client) -> None:
    for path, status in (
        ("/healthz", 200),
        ("/v1/merges/none", 404),
        ("/nowhere", 404),
        ("/v1/merges?limit=x", 422),
    ):
        answer = api.get(path, headers={"X-Request-Id": "mine-1"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (status, "mine-1")
        if status >= 400:
            assert answer.json()["request_id"] == "mine-1"
    first, second = (api.get("/v1/merges/none", headers={"X-Request-Id": "a b"}) for _ in range(2))
    assert OURS.fullmatch(first.headers["x-request-id"])
    assert first.headers["x-request-id"] == first.json()["request_id"] != second.json()["request_id"]


@pytest.mark.valkey
def test_a_request_is_logged_with_its_id_and_job_and_nothing_of_its_query(
    api: httpx.Client, job_store: JobStore, lines: list[dict[str, Any]]
) -> None:
    answer = api.post(
        "/v1/merges", json={"recipe": RECIPE, "output": "/o"}, headers={"X-Request-Id": "mine-2"}
    )
    job = answer.json()["id"]
    assert job_store.get(job).origin["request"] == "mine-2"
    api.get(f"/v1/merges/{job}?secret=hunter2", headers={"X-Request-Id": "mine-3"})
    api.get("/v1/merges/a%0Ab", headers={"X-Request-Id": "mine-4"})
    api.get("/healthz", headers={"X-Request-Id": "quiet"})
    accepted_line, posted, seen, broken = lines
    assert accepted_line == {"event": "job accepted", "job": job, "request": "mine-2"}
    assert (posted["event"], posted["status"], posted["request"]) == ("request", 202, "mine-2")
    assert (seen["request"], seen["job"], seen["route"]) == ("mine-3", job, "/v1/merges/{job}")
    assert seen["seconds"] > 0
    assert "hunter2" not in str(seen)
    assert broken["path"] == "/v1/merges/a%0Ab"


def test_an_error_that_nobody_expected_has_its_request_s_id(
    monkeypatch: pytest.MonkeyPatch, valkey_url: str, lines: list[dict[str, Any]]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(JobStore, "status", broken)
    with serving(create_app(Settings(redis_url=valkey_url, auth="off"))) as client:
        answer = client.get("/v1/merges/x", headers={"X-Request-Id": "mine-5"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-5")
    assert answer.json()["request_id"] == "mine-5"
    assert [(line["event"], line["request"]) for line in lines[:2]] == [
        ("unexpected error", "mine-5"), ("request", "mine-5")
    ]  # fmt: skip
