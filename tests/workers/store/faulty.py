"""A tiny HTTP server whose answers are a script: programmed faults, and every request counted."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Answer:
    """One scripted answer."""

    status: int = 200
    """HTTP status."""
    body: bytes = b""
    """What is sent after the headers."""
    headers: dict[str, str] = field(default_factory=dict)
    """Headers beside Content-Length."""
    length: int | None = None
    """The Content-Length that is claimed, if not the body's."""
    reset: bool = False
    """Cut the connection hard after the body; with status 0, instead of any answer."""
    hang: bool = False
    """Say nothing, or nothing more after the body, until the client gives up."""


def error(status: int, code: str) -> Answer:
    """An S3 error document."""
    return Answer(status, f"<Error><Code>{code}</Code><Message>scripted</Message></Error>".encode())


def ranged(data: bytes, start: int, total: int, **changes: object) -> Answer:
    """Bytes ``[start, start + len(data))`` of an object."""
    headers = {"Content-Range": f"bytes {start}-{start + len(data) - 1}/{total}", "ETag": '"e1"'}
    return Answer(206, data, headers, **changes)  # type: ignore[arg-type]


@dataclass
class FaultyServer:
    """Answers each request with the next of ``script``; the last one again and again."""

    url: str
    """Where it listens."""
    script: list[Answer] = field(default_factory=list)
    """What is still to be answered."""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    """Method, path and lower-case headers of every request so far."""
    bodies: list[bytes] = field(default_factory=list)
    """What came with every request so far."""
    clients: set[int] = field(default_factory=set)
    """The clients' ports: one for each connection."""

    def restart(self, *script: Answer) -> None:
        """Forget the past and follow another script."""
        self.script[:] = script
        self.requests.clear()
        self.bodies.clear()
        self.clients.clear()

    @property
    def methods(self) -> list[str]:
        """The methods of the requests so far."""
        return [method for method, _, _ in self.requests]


@contextlib.contextmanager
def faulty_server(tls: ssl.SSLContext | None = None) -> Iterator[FaultyServer]:
    """A server on a free loopback port for the length of a ``with`` block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            state.bodies.append(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            state.clients.add(self.client_address[1])
            state.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            answer = state.script.pop(0) if len(state.script) > 1 else state.script[0]
            if answer.status and not (answer.hang and not answer.body):
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                length = len(answer.body) if answer.length is None else answer.length
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body)
                self.close_connection = length != len(answer.body)
            if answer.hang:
                self.rfile.read(1)  # returns when the client closes the connection
                self.close_connection = True
            if answer.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """The connections that we cut are meant to be cut."""

    with Server(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        state = FaultyServer(f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
