"""The client against answers that no healthy API gives."""

from __future__ import annotations

import socket
from collections.abc import Callable

import httpx
import pytest

from mergemill import Client
from mergemill.client import PATIENCE_S, SUBMIT_RETRIES_S
from workers.errors import (
    ConflictError,
    CursorError,
    IdempotencyKeyError,
    JobNotFoundError,
    JobStoreUnavailableError,
    MalformedRequestError,
    MergemillError,
    NotReadyError,
    OutputConflictError,
    RecipeError,
    RequestTooLargeError,
    ServiceUnavailableError,
    UnsupportedMediaTypeError,
)

RECIPE = {"merge_method": "linear", "models": [{"model": "s3://bucket/a"}, {"model": "s3://bucket/b"}]}
NOWHERE = "merge-0" + "0" * 25


def fake(handler: Callable[[httpx.Request], httpx.Response]) -> Client:
    return Client("http://api.test", transport=httpx.MockTransport(handler))


@pytest.mark.fast
class TestOddAnswers:
    def test_nobody_there(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ServiceUnavailableError, match=rf"{url}.*mergemill up"):
            Client(url).list()

    def test_a_url_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(MergemillError, match="localhost:8080"):
            Client("localhost:8080")
        monkeypatch.setenv("MERGEMILL_URL", "http://elsewhere:1/")
        assert Client().url == "http://elsewhere:1"

    @pytest.mark.parametrize(
        ("status", "body", "expected"),
        [
            (404, b"<html>", MergemillError),
            (502, b"", MergemillError),
            (200, b"<html>", MergemillError),
            (404, b'{"detail": "Not Found"}', JobNotFoundError),
            (409, b'{"detail": "x", "type": "urn:mergemill:error:output_conflict"}', OutputConflictError),
            (409, b'{"detail": "x", "type": "urn:mergemill:error:of_the_future"}', ConflictError),
            (
                503,
                b'{"detail": "x", "type": "urn:mergemill:error:job_store_unavailable"}',
                JobStoreUnavailableError,
            ),
            (503, b'{"status": 503, "detail": "x", "missing": {"redis": "gone"}}', JobStoreUnavailableError),
            (400, b'{"detail": "x", "type": "urn:mergemill:error:cursor"}', CursorError),
            (400, b'{"detail": "x"}', MalformedRequestError),
            (409, b'{"detail": "x", "type": "urn:mergemill:error:not_ready"}', NotReadyError),
            (413, b'{"detail": "x", "type": "urn:mergemill:error:request_too_large"}', RequestTooLargeError),
            (413, b'{"detail": "x"}', RequestTooLargeError),
            (415, b'{"detail": "x"}', UnsupportedMediaTypeError),
            (
                422,
                b'{"detail": "x", "type": "urn:mergemill:error:request", "errors": ["a", "b"]}',
                RecipeError,
            ),
            (500, b'{"detail": "x"}', MergemillError),
            (500, b"[]", MergemillError),
        ],
    )
    def test_answers_become_errors(self, status: int, body: bytes, expected: type[MergemillError]) -> None:
        with pytest.raises(MergemillError) as caught:
            fake(lambda _: httpx.Response(status, content=body)).ready()
        assert type(caught.value) is expected
        assert str(caught.value)

    def test_waiting_bears_with_an_api_that_is_being_restarted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answers: list[httpx.Response | Exception] = [
            httpx.ConnectError("refused"),
            httpx.Response(503, json={"detail": "no redis"}),
            httpx.ReadTimeout("slow"),
            httpx.Response(200, json=_body("running")),
            httpx.RemoteProtocolError("gone"),
            httpx.Response(429, json={"detail": "too often"}),
            httpx.Response(200, json=_body("succeeded")),
        ]

        def handler(request: httpx.Request) -> httpx.Response:
            if request.url.path.endswith("/events"):
                return httpx.Response(404)
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr("mergemill.client.POLL_S", (0.001, 0.001))
        assert fake(handler).wait(NOWHERE).state == "succeeded"
        assert answers == []

    def test_but_not_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = Clock()
        monkeypatch.setattr("mergemill.client.time", clock)

        def refuse(_: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

        with pytest.raises(ServiceUnavailableError):
            fake(refuse).wait(NOWHERE)
        assert PATIENCE_S < clock.now < PATIENCE_S + 5

    def test_polling_is_gentle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, looks = Clock(), [0]
        monkeypatch.setattr("mergemill.client.time", clock)

        def handler(_: httpx.Request) -> httpx.Response:
            looks[0] += 1
            return httpx.Response(200, json=_body("succeeded" if clock.now > 600 else "running"))

        told: list[str] = []
        fake(handler).wait(NOWHERE, lambda job: told.append(str(job)))
        assert 590 < looks[0] < 660
        assert told == [f"{NOWHERE} running 50 %", f"{NOWHERE} succeeded"]  # what stays as it is is told once

    def test_a_submission_is_sent_again_with_its_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, keys = Clock(), []
        monkeypatch.setattr("mergemill.client.time", clock)
        answers: list[httpx.Response | Exception] = [
            httpx.ReadError("lost"),
            httpx.ConnectError("the API starts again"),
            httpx.Response(503, json={"detail": "no redis"}),
            httpx.Response(202, json=_body("queued")),
        ]

        def handler(request: httpx.Request) -> httpx.Response:
            keys.append(request.headers["idempotency-key"])
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        assert fake(handler).submit(RECIPE, "s3://b/o").id == NOWHERE
        assert (len(keys), len(set(keys)), clock.now) == (4, 1, sum(SUBMIT_RETRIES_S[:3]))
        answers += [httpx.ReadError("lost")] * 10
        with pytest.raises(ServiceUnavailableError):
            fake(handler).submit(RECIPE, "s3://b/o", idempotency_key="mine")
        assert keys[4:] == ["mine"] * (len(SUBMIT_RETRIES_S) + 1)
        assert len({keys[0], keys[4]}) == 2

    @pytest.mark.parametrize(
        "answer", [httpx.ConnectError("refused"), httpx.Response(422, json={"detail": "x"})]
    )
    def test_what_waiting_does_not_mend_is_not_sent_again(self, answer: httpx.Response | Exception) -> None:
        asked = []

        def handler(request: httpx.Request) -> httpx.Response:
            asked.append(request.headers["idempotency-key"])
            if isinstance(answer, Exception):
                raise answer
            return answer

        for _ in range(2):
            with pytest.raises(MergemillError):
                fake(handler).submit(RECIPE, "s3://b/o")
        assert len(set(asked)) == 2
        with pytest.raises(IdempotencyKeyError):
            fake(handler).submit(RECIPE, "s3://b/o", idempotency_key="a\nb")
        assert len(asked) == 2

    @pytest.mark.parametrize("recipe", ["a: [", "- list", "", "x: 2020-01-01", "x: .nan"])
    def test_a_recipe_that_is_none_is_not_even_sent(self, recipe: str) -> None:
        def never(_: httpx.Request) -> httpx.Response:
            raise AssertionError

        with pytest.raises(RecipeError):
            fake(never).submit(recipe, "s3://bucket/out")


class Clock:
    """The client's own :mod:`time`, in which a pause takes none.

    The real module is everybody's: an event loop in another thread that meets another clock, if only for a moment,
    takes its next timer to be hours away, and sleeps.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, pause: float) -> None:
        self.now += pause


def _body(state: str) -> dict[str, object]:
    progress = {"bytes_done": 1, "bytes_total": 2, "of_the_future": 3}
    at = "2026-01-01T00:00:00Z"
    return {
        "id": NOWHERE, "state": state, "output": "s3://b/o", "created_at": at, "updated_at": at,
        "cancel_requested": False, "progress": progress, "error": None, "new": 1,
    }  # fmt: skip
