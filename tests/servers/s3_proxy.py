"""A reverse proxy before an S3 server that counts requests by operation, and can hold one back.

It forwards the Host header that the client signed, so signatures stay valid.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from service.warden import processes

_DROPPED = {"connection", "keep-alive", "expect", "transfer-encoding"}
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Request:
    """A request on its way to the server."""

    operation: str
    """S3's name for it."""
    path: str
    """Bucket and key."""
    query: dict[str, list[str]]
    """Query parameters."""
    client: int
    """The client's port."""

    def pid(self) -> int:
        """Process id of the client, 0 when it is gone."""
        return owner_of(self.client)


@dataclass
class S3Proxy:
    """A running proxy."""

    url: str
    """Where it listens."""
    counts: Counter[str] = field(default_factory=Counter)
    """Requests that came, by operation."""
    hold: Callable[[Request], bool] = lambda _: False
    """Whether to hold this request back; asked for one at a time until it says yes."""
    held: Request | None = None
    """The request that is held back, or was."""
    drop: threading.Event = field(default_factory=threading.Event)
    """Set to drop what is held: it never reaches the server."""


def operation_of(method: str, query: dict[str, list[str]]) -> str:
    """S3's name for a request, as far as tests care."""
    if "uploadId" in query:
        names = {"POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload", "GET": "ListParts"}
        return names.get(method, "UploadPart")
    if "uploads" in query:
        return "CreateMultipartUpload" if method == "POST" else "ListMultipartUploads"
    return method


def owner_of(port: int) -> int:
    """The process on this machine that has a TCP socket with this local port; 0 when there is none."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in processes():
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) in inodes:
                        return process.pid
    return 0


def ancestors(pid: int) -> list[int]:
    """The process and those above it."""
    parents = {process.pid: process.parent for process in processes()}
    found = []
    while pid in parents:
        found.append(pid)
        pid = parents[pid]
    return found


@contextlib.contextmanager
def s3_proxy(upstream: str) -> Iterator[S3Proxy]:
    """A proxy on a free loopback port for the length of a ``with`` block."""
    target = urlsplit(upstream).netloc
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = urlsplit(self.path)
            query = parse_qs(parts.query, keep_blank_values=True)
            operation = operation_of(self.command, query)
            request = Request(operation, parts.path, query, self.client_address[1])
            with lock:
                state.counts[operation] += 1
                hold = state.held is None and state.hold(request)
                if hold:
                    state.held = request
            if hold:
                state.drop.wait(_PATIENCE_S)
                self.close_connection = True
                return
            upstream = http.client.HTTPConnection(target, timeout=_PATIENCE_S)
            with contextlib.closing(upstream):
                upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in _DROPPED:
                        upstream.putheader(name, value)
                upstream.endheaders(body)
                answer = upstream.getresponse()
                data = answer.read()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _DROPPED | {"content-length"}:
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else None
            self.send_header("Content-Length", length or str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _forward  # noqa: N815 - the library's names

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Clients that were killed broke their connections off."""

    with Server(("127.0.0.1", 0), Handler) as server:
        state = S3Proxy(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            state.drop.set()
            server.shutdown()
            thread.join()
