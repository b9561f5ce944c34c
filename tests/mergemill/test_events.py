"""The client on event streams: real ones, broken ones, and where there are none."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from api.app import create_app
from mergemill import Client, Event, Job
from mergemill.events import NoStreamError, messages
from service.jobs.jobstore import JobStore
from service.jobs.record import JobState
from service.settings import Settings
from tests.api.conftest import serving
from tests.service.held_jobs import claimed
from tests.service.job_steps import PATHS, TO_RUNNING, part
from workers.errors import JobFailedError, JobNotFoundError, JobTimeoutError, MalformedRequestError

JOB = "merge-0" + "0" * 25
STEPS = PATHS[JobState.SUCCEEDED]
NAMES = [
    "created", "planning_started", "planned", "uploads_opened", "commit_started",
    "shard_completed", "shard_completed", "succeeded",
]  # fmt: skip


@contextmanager
def counting(url: str) -> Iterator[tuple[Client, list[str]]]:
    """A client, and the paths that it asked for."""
    asked: list[str] = []
    with Client(url) as client:
        client._http.event_hooks["request"] = [lambda request: asked.append(request.url.path)]
        yield client, asked


@pytest.fixture
def url(valkey_url: str, valkey_namespace: str) -> Iterator[str]:
    with serving(create_app(Settings(redis_url=valkey_url, namespace=valkey_namespace, auth="off"))) as api:
        yield str(api.base_url)


@pytest.mark.valkey
class TestOnARealApi:
    def test_waiting_is_woken_and_does_not_ask_in_between(self, url: str, job_store: JobStore) -> None:
        record, lease = claimed(job_store, *TO_RUNNING)
        seen: list[Job] = []
        heard = threading.Condition()

        def on_progress(job: Job) -> None:
            with heard:
                seen.append(job)
                heard.notify()

        def wait_for(condition: Callable[[], bool]) -> None:
            with heard:
                assert heard.wait_for(condition, 20), seen

        with counting(url) as (client, asked), ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(client.wait, record.id, on_progress, 60)
            wait_for(lambda: bool(seen))
            job_store.record_part(lease, part(1))
            wait_for(lambda: seen[-1].progress.bytes_done == 1000)
            assert seen[-1].body["progress"]["bytes_done"] == 1000
            for event in STEPS[3:]:
                job_store.apply(record.id, event, lease.token)
            assert waiting.result(20) == seen[-1]
        assert asked.count(f"/v1/merges/{record.id}/events") == 1
        assert 2 <= asked.count(f"/v1/merges/{record.id}") <= 2 + len(STEPS[3:])
        assert [job.progress.bytes_done for job in seen] == sorted(job.progress.bytes_done for job in seen)

    def test_a_wait_ends_in_time_though_the_stream_is_alive(self, url: str, job_store: JobStore) -> None:
        record, _ = claimed(job_store, *TO_RUNNING)
        with Client(url) as client:
            begun = time.monotonic()
            with pytest.raises(JobTimeoutError):
                client.wait(record.id, timeout=0.5)
            assert 0.5 <= time.monotonic() - begun < 5

    def test_events_from_any_place(self, url: str, job_store: JobStore) -> None:
        record, _ = claimed(job_store, *STEPS)
        with Client(url) as client:
            events = list(client.events(record.id))
            assert [event.event for event in events] == NAMES
            assert (events[-1].job, events[-1].state, events[-1].version) == (record.id, "succeeded", 8)
            assert events[-1].progress.parts_total == 3
            assert list(client.events(record.id, events[3].id)) == events[4:]
            assert list(client.events(record.id, events[-1].id)) == []
            with pytest.raises(JobNotFoundError):
                next(client.events(JOB))
            with pytest.raises(MalformedRequestError):
                next(client.events(record.id, "nonsense"))

    def test_events_and_waiting_survive_an_api_that_is_started_again(
        self, valkey_url: str, job_store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mergemill.client.POLL_S", (0.01, 0.05))
        record, lease = claimed(job_store)
        settings = Settings(redis_url=valkey_url, namespace=job_store._namespace, auth="off")
        found: list[Event] = []
        started = threading.Semaphore(0)

        def follow(client: Client) -> None:
            for event in client.events(record.id):
                found.append(event)
                started.release()

        with ThreadPoolExecutor(2) as pool, Client("http://127.0.0.1:1") as client:
            with serving(create_app(settings)) as api:
                client._http.base_url = api.base_url
                following, waiting = pool.submit(follow, client), pool.submit(client.wait, record.id)
                assert started.acquire(timeout=20)
            for event in STEPS[:4]:
                job_store.apply(record.id, event, lease.token)
            with serving(create_app(settings)) as api:  # as if at the same address
                client._http.base_url = api.base_url
                for _ in range(4):
                    assert started.acquire(timeout=20)
                for event in STEPS[4:]:
                    job_store.apply(record.id, event, lease.token)
                following.result(20)
                assert waiting.result(20).state == "succeeded"
        assert [event.event for event in found] == NAMES
        assert len({event.id for event in found}) == len(NAMES)


def body(state: str, version: int, done: int = 0) -> dict[str, Any]:
    at, progress = "2026-01-01T00:00:00Z", {"parts_done": done, "bytes_done": done, "bytes_total": 9}
    return {
        "id": JOB, "state": state, "version": version, "output": "s3://b/o", "created_at": at, "updated_at": at,
        "cancel_requested": False, "progress": progress, "error": None,
    }  # fmt: skip


def sse(number: int, event: str, state: str, version: int, done: int = 0) -> bytes:
    said = {
        **body(state, version, done),
        "job": JOB,
        "event": event,
        "at": "2026-01-01T00:00:00Z",
        "detail": "",
    }
    return f"id: {number}-0\nevent: {event}\ndata: {json.dumps(said)}\n\n".encode()


class Script(httpx.SyncByteStream):
    """Some bytes, and then the connection breaks."""

    def __init__(self, *chunks: bytes) -> None:
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        yield from self._chunks
        raise httpx.ReadError("reset")


@pytest.mark.fast
class TestOddStreams:
    @pytest.fixture(autouse=True)
    def _fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mergemill.client.POLL_S", (0.001, 0.001))

    def client(self, streams: list[Any], looks: list[dict[str, Any]], asked: list[str | None]) -> Client:
        """A service that gives these answers, each once, and goes on with the last."""

        def handle(request: httpx.Request) -> httpx.Response:
            if not request.url.path.endswith("/events"):
                return httpx.Response(200, json=looks.pop(0) if len(looks) > 1 else looks[0])
            asked.append(request.headers.get("Last-Event-ID"))
            answer = streams.pop(0) if len(streams) > 1 else streams[0]
            if isinstance(answer, httpx.Response):
                return answer
            headers = {"Content-Type": "text/event-stream; charset=utf-8"}
            return httpx.Response(200, headers=headers, stream=Script(*answer))

        return Client("http://api.test", transport=httpx.MockTransport(handle))

    def test_a_stream_that_breaks_is_gone_on_with(self) -> None:
        asked: list[str | None] = []
        seen: list[Job] = []
        streams = [
            [
                sse(1, "created", "queued", 1),
                sse(2, "progress", "running", 4, 1),
                sse(3, "progress", "running", 4, 3),
            ],
            [b":\n\n", sse(4, "progress", "running", 4, 5)[:-20]],
            [sse(4, "progress", "running", 4, 5), sse(5, "succeeded", "succeeded", 5, 9)],
        ]
        running = body("running", 4, 2)
        looks = [running, running, body("running", 4, 3), body("succeeded", 5, 9)]
        client = self.client(streams, looks, asked)
        assert client.wait(JOB, seen.append).state == "succeeded"
        assert asked == [None, "3-0", "3-0"]
        assert [job.progress.parts_done for job in seen] == [2, 3, 2, 3, 5, 9]

    @pytest.mark.parametrize(
        "answer",
        [
            httpx.Response(404),
            httpx.Response(405),
            httpx.Response(200, json={}),
            httpx.Response(200, text="<html>"),
        ],
    )
    def test_where_there_are_no_streams_waiting_asks_once_and_looks(self, answer: httpx.Response) -> None:
        asked: list[str | None] = []
        looks = [body("running", 4)] * 5 + [body("succeeded", 5)]
        assert self.client([answer], looks, asked).wait(JOB).state == "succeeded"
        assert asked == [None]

    @pytest.mark.parametrize(
        "answer",
        [httpx.Response(503), httpx.Response(429), [], [b"data: {\n\n"], [b"data: {}\n\n"], [b"\xff\xfe"]],
    )
    def test_streams_that_are_none_do_not_end_the_waiting(self, answer: Any) -> None:
        asked: list[str | None] = []
        looks = [body("running", 4)] * 3 + [body("failed", 5)]
        with pytest.raises(JobFailedError):
            self.client([answer], looks, asked).wait(JOB)
        assert asked == [None] * 3

    def test_events_go_on_after_they_were_asked_for_too_often(self) -> None:
        asked: list[str | None] = []
        streams = [httpx.Response(429), [sse(1, "cancelled", "cancelled", 2)]]
        events = list(self.client(streams, [body("cancelled", 2)], asked).events(JOB))
        assert [event.event for event in events] == ["cancelled"]
        assert asked == [None, None]

    def test_events_of_a_service_without_them(self) -> None:
        with pytest.raises(NoStreamError):
            next(self.client([httpx.Response(200, json={})], [body("running", 4)], []).events(JOB))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("id: 1\ndata: a\n\n", [("1", "a")]),
        ("id:1\ndata:a\n\n", [("1", "a")]),
        ("data: a\ndata: b\n\n", [("", "a\nb")]),
        ("id: 1\ndata: a\n\ndata: b\n\n", [("1", "a"), ("1", "b")]),
        ("retry: 5\n\nevent: x\n\n: c\n\n", [None]),
        ("data: half", []),
        ("unknown: x\ndata\n\n", [("", "")]),
    ],
)
def test_the_format(text: str, expected: list[Any]) -> None:
    assert list(messages(text.split("\n"))) == expected
