"""A receiver of webhooks that behaves as it is told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Behaviour = Callable[["Handler"], None]
"""What to do with one request that was read."""


@dataclass(frozen=True, slots=True)
class Received:
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float


class Handler(BaseHTTPRequestHandler):
    """Reads a request and hands it to the receiver's next behaviour."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        receiver: Receiver = self.server.receiver  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        behave = receiver.take(Received(self.path, headers, body, time.monotonic()))
        self.close_connection = True
        try:
            behave(self)
        except OSError:  # it does not wait for us
            receiver.given_up += 1

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Say nothing."""


def status(code: int, **headers: str) -> Behaviour:
    """Answer with a status and headers."""

    def behave(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return behave


def closes(handler: Handler) -> None:
    """Close the connection without a word."""
    handler.connection.close()


def speaks_nonsense(handler: Handler) -> None:
    """Answer what is no HTTP."""
    handler.wfile.write(b"220 smtp.example.com ESMTP\r\n")


def drips(handler: Handler) -> None:
    """Send a header that never ends, a byte at a time."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        handler.wfile.write(b"x")
        time.sleep(0.02)


def pours(handler: Handler) -> None:
    """Answer well, with a body that never ends."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
    while True:
        handler.wfile.write(b"x" * (1 << 16))


class Receiver:
    """Listens on loopback; a context manager."""

    def __init__(self, *behaviours: Behaviour) -> None:
        self.received: list[Received] = []
        self.given_up = 0
        """How often the other side had gone before all was said."""
        self.released = threading.Event()
        """Set at the end, for those that hang."""
        self._behaviours = list(behaviours)
        self._news = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._server.receiver = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def take(self, received: Received) -> Behaviour:
        """Note a request; what to do with it: the next behaviour, or 204 when there is none left."""
        with self._news:
            self.received.append(received)
            self._news.notify_all()
            return self._behaviours.pop(0) if self._behaviours else status(204)

    def hangs(self, _: Handler) -> None:
        """Say nothing until the end."""
        self.released.wait(60)

    def wait_for(self, count: int, seconds: float = 20) -> list[Received]:
        """So many requests."""
        with self._news:
            assert self._news.wait_for(lambda: len(self.received) >= count, seconds), self.received
        return self.received

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
