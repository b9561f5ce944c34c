"""What followers and webhooks have to hear: less, more and forged is said to be wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import httpx
import pytest

from service.webhooks.webhooks import signature
from tests.chaos.told import SECRET, Follower, deliveries, events
from tests.servers.receiver import Received

pytestmark = pytest.mark.fast

JOB = "merge-0"
COUNTS = (
    "bytes_done", "bytes_total", "bytes_read", "parts_done", "parts_total", "surveys_done", "surveys_total",
)  # fmt: skip


def said(heard: str, written: str) -> str:
    def entries(text: str) -> list[tuple[str, str]]:
        return [(each, f"event {each}") for each in text]

    return "\n".join(events("job", entries(heard), entries(written)))


def test_an_event_that_was_lost_or_doubled_or_made_up() -> None:
    assert said("abc", "abc") == ""
    assert "twice of [('b'" in said("abbc", "abc")
    assert "never heard of [('b'" in said("ac", "abc")
    assert "which never were" in said("abcd", "abc")
    assert "out of order" in said("bac", "abc")


def received(kind: str, name: str, job: str = JOB, secret: str = SECRET) -> Received:
    body = json.dumps({"type": f"merge.{kind}", "data": {"job": job}}).encode()
    now = int(time.time())
    signed = {
        "webhook-id": name,
        "webhook-timestamp": str(now),
        "webhook-signature": signature(secret, name, now, body),
    }
    return Received("/hook", signed, body, 0.0)


@pytest.mark.parametrize(
    ("came", "refused", "words"),
    [
        ([received("failed", "1")], 0, ""),
        ([received("failed", "1"), received("failed", "1")], 1, ""),
        ([received("failed", "1"), received("failed", "9", "merge-of-another-run")], 0, ""),
        ([], 0, "was told nothing"),
        ([received("succeeded", "1")], 0, "was told ['merge.succeeded']"),
        ([received("failed", "1"), received("succeeded", "2")], 0, "was told ['merge.failed', 'merge.succ"),
        ([received("failed", "1")], 1, "1 was refused and did not come again"),
        ([received("failed", "1", secret="whsec_" + "A" * 32)], 0, "signature is wrong"),
    ],
)
def test_webhooks(came: list[Received], refused: int, words: str) -> None:
    wrong = "\n".join(deliveries({JOB: "failed"}, came, refused))
    assert wrong == "" if not words else words in wrong


class _Api(BaseHTTPRequestHandler):
    """Has seven events, breaks each stream off after the third, and is away every other time."""

    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        after = self.headers.get("Last-Event-ID")
        self.asked.append(after)
        if len(self.asked) % 2:
            self.send_error(503)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        first = int(after or 0) + 1
        for number in range(first, min(first + 3, 8)):
            state = "succeeded" if number == 7 else "running"
            progress = dict.fromkeys(COUNTS, 0)
            body = {
                "job": JOB, "event": "e", "state": state, "version": number, "at": "2026-11-22T12:00:00Z",
                "detail": "", "progress": progress,
            }  # fmt: skip
            self.wfile.write(f"id: {number}\ndata: {json.dumps(body)}\n\n".encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Say nothing."""


@contextmanager
def api() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Api) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_follower_comes_again_after_what_it_heard_last() -> None:
    _Api.asked.clear()
    follower = Follower(JOB)
    with api() as url, httpx.Client(base_url=url, timeout=5) as http:
        follower.follow(http, threading.Event())
    assert [event.id for event in follower.heard] == ["1", "2", "3", "4", "5", "6", "7"]
    assert _Api.asked == [None, None, "3", "3", "6", "6"]
    assert follower.again == 4
