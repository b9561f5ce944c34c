"""``/v1/merges/{id}/events`` on a real server and Valkey: every event once, across breaks, restarts and crowds."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import httpx
import pytest
import redis

from api import streams
from api.app import create_app
from mergemill.events import messages
from service.jobs.jobstore import JobStore, Lease
from service.jobs.record import JobState
from service.jobs.transitions import CancelRequested, CommitStarted, Event, PlanningStarted, Succeeded
from service.keystore import KeyStore
from service.settings import Settings
from service.valkey import EmbeddedValkey
from tests.api.conftest import serving
from tests.servers.keys import bearer, make_key
from tests.service.held_jobs import claimed
from tests.service.job_steps import ALL_COMPLETE, PATHS, TO_RUNNING, part

pytestmark = pytest.mark.valkey

JSON = dict[str, Any]
STEPS: tuple[Event, ...] = PATHS[JobState.SUCCEEDED]
NAMES = [
    "created", "planning_started", "planned", "uploads_opened", "commit_started",
    "shard_completed", "shard_completed", "succeeded",
]  # fmt: skip


def path(job: str) -> str:
    return f"/v1/merges/{job}/events"


class Reader:
    """One connection to a stream, read as far as a test wants."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._found = messages(response.iter_lines())

    def next(self) -> tuple[str, JSON]:
        """The next event's id and data; heartbeats are passed over."""
        while (found := next(self._found)) is None:
            pass
        return found[0], json.loads(found[1])

    def rest(self) -> list[tuple[str, JSON]]:
        """Every event until the server closes the stream."""
        return [(found[0], json.loads(found[1])) for found in self._found if found is not None]


@contextmanager
def reading(api: httpx.Client, job: str, after: str | None = None, **options: Any) -> Iterator[Reader]:
    headers = options.pop("headers", {}) | ({} if after is None else {"Last-Event-ID": after})
    with api.stream("GET", path(job), headers=headers, **options) as response:
        assert response.status_code == 200, response.read()
        yield Reader(response)


def names(found: list[tuple[str, JSON]]) -> list[str]:
    return [data["event"] for _, data in found]


def apply(store: JobStore, lease: Lease, *events: Event) -> None:
    for event in events:
        store.apply(lease.job, event, lease.token)


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


class TestReplay:
    def test_a_job_that_has_ended_is_told_whole(self, api: httpx.Client, job_store: JobStore) -> None:
        record, _ = claimed(job_store, *STEPS)
        with reading(api, record.id) as stream:
            assert stream.response.headers["content-type"].startswith("text/event-stream")
            assert stream.response.headers["cache-control"] == "no-store"
            assert stream.response.headers["x-accel-buffering"] == "no"
            found = stream.rest()
        assert names(found) == NAMES
        assert [data["version"] for _, data in found] == list(range(1, len(NAMES) + 1))
        assert found[-1][1] == {
            "job": record.id, "event": "succeeded", "state": "succeeded", "version": 8, "detail": "",
            "at": found[-1][1]["at"],
            "progress": {"bytes_done": 0, "bytes_total": 3000, "bytes_read": 0, "parts_done": 0, "parts_total": 3,
                         "surveys_done": 0, "surveys_total": 2},
        }  # fmt: skip

    def test_the_bytes_are_those_of_the_standard(self, api: httpx.Client, job_store: JobStore) -> None:
        record, _ = claimed(job_store)
        job_store.apply(record.id, CancelRequested())
        retry, created, cancelled, end = api.get(path(record.id)).text.split("\n\n")
        assert (retry, end) == ("retry: 1000", "")
        for block, name in ((created, "created"), (cancelled, "cancelled")):
            id_line, event_line, data_line = block.split("\n")
            assert id_line.startswith("id: ") and event_line == f"event: {name}"
            assert json.loads(data_line.removeprefix("data: "))["event"] == name

    def test_every_place_to_go_on_from(self, api: httpx.Client, job_store: JobStore) -> None:
        record, _ = claimed(job_store, *STEPS)
        with reading(api, record.id) as stream:
            whole = stream.rest()
        for number, (last, _) in enumerate(whole[:-1], start=1):
            with reading(api, record.id, last) as stream:
                assert stream.rest() == whole[number:]
            with reading(api, record.id, params={"last_event_id": last}) as stream:
                assert stream.rest() == whole[number:]
            with reading(api, record.id, last, params={"last_event_id": whole[-1][0]}) as stream:
                assert stream.rest() == whole[number:]  # what a browser sends when it connects again
        answer = api.get(path(record.id), headers={"Last-Event-ID": whole[-1][0]})
        assert (answer.status_code, answer.content) == (204, b"")

    def test_a_long_stream_is_told_in_several_reads(self, api: httpx.Client, job_store: JobStore) -> None:
        record, lease = claimed(job_store, *TO_RUNNING)
        for number in range(250):
            job_store.warn(lease, f"{number}")
        with reading(api, record.id) as stream:
            found = [stream.next()[1] for _ in range(4 + 250)]
        assert [data["detail"] for data in found[4:]] == [str(number) for number in range(250)]

    def test_a_job_of_before_there_were_streams(
        self, api: httpx.Client, job_store: JobStore, raw: redis.Redis
    ) -> None:
        ended, _ = claimed(job_store, *PATHS[JobState.FAILED])
        going, lease = claimed(job_store, *TO_RUNNING)
        for record in (ended, going):
            raw.delete(f"{job_store._namespace}:job:{record.id}:events")
        with reading(api, ended.id) as stream:
            ((last, data),) = stream.rest()
        assert (last, data["event"], data["version"]) == ("", "failed", ended.version)
        with reading(api, going.id) as stream:
            apply(job_store, lease, CommitStarted(), *ALL_COMPLETE, Succeeded({}))
            assert names(stream.rest()) == NAMES[4:]

    def test_what_is_refused(self, api: httpx.Client, job_store: JobStore) -> None:
        record, _ = claimed(job_store)
        for job in ("merge-0" + "0" * 25, "none", f"{record.id}:parts"):
            answer = api.get(path(job))
            assert (answer.status_code, answer.json()["type"]) == (404, "urn:mergemill:error:job_not_found")
        answer = api.get(path(record.id), headers={"Last-Event-ID": "last"})
        assert (answer.status_code, answer.json()["type"]) == (400, "urn:mergemill:error:malformed_request")

    def test_head_does_not_wait(self, api: httpx.Client, job_store: JobStore) -> None:
        record, _ = claimed(job_store)
        answer = api.head(path(record.id))
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-type"].startswith("text/event-stream")

    def test_no_redis(self, lonely_api: httpx.Client) -> None:
        assert lonely_api.get(path("merge-0" + "0" * 25)).status_code == 503


class TestLive:
    def test_what_happens_is_told_at_once(self, api: httpx.Client, job_store: JobStore) -> None:
        record, lease = claimed(job_store)
        with reading(api, record.id) as stream:
            assert stream.next()[1]["event"] == "created"
            for event, name in zip(STEPS, NAMES[1:], strict=True):
                begun = time.monotonic()
                apply(job_store, lease, event)
                assert stream.next()[1]["event"] == name
                assert time.monotonic() - begun < 5  # not a heartbeat later
                if name == "uploads_opened":
                    job_store.record_part(lease, part(1))
                    data = stream.next()[1]
                    assert (data["event"], data["progress"]["bytes_done"]) == ("progress", 1000)
            assert stream.rest() == []

    def test_a_silent_stream_shows_that_it_is_alive(
        self, job_store: JobStore, valkey_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(streams.Streams.__init__, "__defaults__", (0.05,))
        record, _ = claimed(job_store)
        settings = Settings(redis_url=valkey_url, namespace=job_store._namespace, auth="off")
        with serving(create_app(settings)) as api, api.stream("GET", path(record.id)) as response:
            beats = 0
            for line in response.iter_lines():
                beats += line == ":"
                if beats == 3:
                    break
        assert beats == 3

    def test_a_stream_ends_when_its_key_is_revoked(
        self,
        api: httpx.Client,
        job_store: JobStore,
        valkey_url: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """And not before, nor that of another key; whether the job is silent or not."""
        monkeypatch.setattr(streams, "RECHECK_S", 0.05)
        record, lease = claimed(job_store)
        token = make_key(valkey_url, job_store._namespace)
        with ExitStack() as stack, KeyStore(valkey_url, job_store._namespace) as keys:
            theirs = stack.enter_context(reading(api, record.id, headers=bearer(token)))
            ours = stack.enter_context(reading(api, record.id))
            for stream in (theirs, ours):
                assert stream.next()[1]["event"] == "created"
            apply(job_store, lease, PlanningStarted())
            assert theirs.next()[1]["event"] == "planning_started"
            keys.revoke(token.split("_")[1], time.time())
            assert theirs.rest() == []
            assert ours.next()[1]["event"] == "planning_started"
            job_store.apply(record.id, CancelRequested())
            assert ours.next()[1]["event"] == "cancel_requested"

    def test_sixty_streams_of_twelve_jobs_lose_nothing(self, api: httpx.Client, job_store: JobStore) -> None:
        jobs = [claimed(job_store)[1] for _ in range(12)]
        limits = httpx.Limits(max_connections=100)
        with httpx.Client(base_url=api.base_url, headers=api.headers, timeout=60, limits=limits) as http:

            def follow(lease: Lease) -> list[tuple[str, JSON]]:
                with reading(http, lease.job) as stream:
                    return stream.rest()

            with ThreadPoolExecutor(60) as pool:
                asked = [pool.submit(follow, lease) for lease in jobs for _ in range(5)]
                for event in STEPS:
                    for lease in jobs:
                        apply(job_store, lease, event)
                found = [future.result() for future in asked]
        assert all(names(events) == NAMES for events in found)
        assert len({json.dumps(events) for events in found}) == 12

    def test_any_number_of_streams_waits_at_one_connection(
        self, api: httpx.Client, job_store: JobStore, raw: redis.Redis
    ) -> None:
        jobs = [claimed(job_store)[0].id for _ in range(5)]
        blocked = lambda: raw.info("clients")["blocked_clients"]  # noqa: E731
        with ExitStack() as stack:
            for job in jobs * 3:
                assert stack.enter_context(reading(api, job)).next()[1]["event"] == "created"
            until(lambda: blocked() == 1)
        until(lambda: blocked() == 0)

    def test_a_client_that_leaves_is_forgotten_at_once(self, valkey_url: str, job_store: JobStore) -> None:
        record, _ = claimed(job_store)
        app = create_app(Settings(redis_url=valkey_url, namespace=job_store._namespace, auth="off"))
        with serving(app) as api:
            port = api.base_url.port
            assert port is not None
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", port)) as rude:
                    rude.sendall(f"GET {path(record.id)} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                    assert rude.recv(1)
            until(lambda: not app.state.streams._woken, 5)

    def test_a_server_that_ends_ends_its_streams(self, valkey_url: str, job_store: JobStore) -> None:
        record, _ = claimed(job_store)
        with ThreadPoolExecutor(10) as pool:
            with serving(
                create_app(Settings(redis_url=valkey_url, namespace=job_store._namespace, auth="off"))
            ) as api:
                opened = threading.Barrier(11)

                def follow() -> list[str]:
                    with (
                        httpx.Client(base_url=api.base_url, timeout=60) as http,
                        reading(http, record.id) as stream,
                    ):
                        first = stream.next()
                        opened.wait(30)
                        return names([first, *stream.rest()])

                asked = [pool.submit(follow) for _ in range(10)]
                opened.wait(30)
                begun = time.monotonic()
            assert time.monotonic() - begun < 5
            assert [future.result(10) for future in asked] == [["created"]] * 10


class TestBreaks:
    def test_every_event_comes_once_though_the_api_is_started_again_and_again(
        self, valkey_url: str, job_store: JobStore
    ) -> None:
        record, lease = claimed(job_store)
        settings = Settings(redis_url=valkey_url, namespace=job_store._namespace, auth="off")
        found: list[tuple[str, JSON]] = []
        steps, done = iter(STEPS), 1
        while done <= len(STEPS):
            last = found[-1][0] if found else None
            with serving(create_app(settings)) as api, reading(api, record.id, last) as stream:
                found += [stream.next() for _ in range(done - len(found))]
                for event in islice(steps, 1):
                    apply(job_store, lease, event)
                    done += 1
                    found.append(stream.next())
            for event in islice(steps, 1):  # while nobody serves
                apply(job_store, lease, event)
                done += 1
        with serving(create_app(settings)) as api, reading(api, record.id) as stream:
            assert stream.rest() == found
        assert names(found) == NAMES

    def test_a_redis_that_is_killed_and_comes_back(self, tmp_path: Any, valkey_namespace: str) -> None:
        with EmbeddedValkey(tmp_path) as first, ExitStack() as stack:
            store = stack.enter_context(JobStore(first.url, valkey_namespace))
            record, lease = claimed(store, PlanningStarted())
            api = stack.enter_context(
                serving(create_app(Settings(redis_url=first.url, namespace=valkey_namespace, auth="off")))
            )
            stream = stack.enter_context(reading(api, record.id))
            found = [stream.next(), stream.next()]
            os.kill(first.pid, signal.SIGKILL)
            until(lambda: not first.is_running)
            stack.enter_context(EmbeddedValkey(tmp_path, first.port))
            apply(store, lease, *STEPS[1:])
            found += stream.rest()
            assert names(found) == NAMES
