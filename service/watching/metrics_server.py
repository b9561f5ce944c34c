"""Where a scheduler shows its metrics; and who may see metrics at all, a scheduler's or the API's."""

from __future__ import annotations

import hmac
import ipaddress
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Self

import structlog
from prometheus_client.registry import Collector

from service.watching.metrics import CONTENT_TYPE, render

PATH: Final = "/metrics"
"""Where metrics are."""

TIMEOUT_S: Final = 10.0
"""Longest wait for a client, in seconds."""

REFUSAL: Final = (
    "metrics are for this machine, and for whoever sends MERGEMILL_METRICS_TOKEN as a bearer token"
)
"""What everybody else is told, with 403."""

log = structlog.get_logger(__name__)


def may_read(peer: str | None, header: Callable[[str], str | None], token: str | None) -> bool:
    """Whether metrics may be shown: to a peer on this machine that asks for itself, or to whoever has the token.

    :param peer: the client's address.
    :param header: the request's header of a name, in whatever case.
    :param token: ``MERGEMILL_METRICS_TOKEN``, if it is set: then nobody goes without.
    """
    if token:
        scheme, _, given = (header("Authorization") or "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())
    if any(header(name) is not None for name in ("Forwarded", "X-Forwarded-For", "X-Real-Ip", "Via")):
        return False  # a proxy on this machine asks for somebody else
    try:
        return peer is not None and ipaddress.ip_address(peer.partition("%")[0]).is_loopback
    except ValueError:  # a Unix socket's name
        return False


class MetricsServer:
    """Answers ``GET /metrics`` in threads of its own; a context manager.

    An address that cannot be had is a warning, since a scheduler is worth more than its metrics.
    """

    def __init__(self, host: str, port: int, token: str | None, *collectors: Collector) -> None:
        self.port: int | None = None
        """The port that it listens on, if it could."""
        try:
            self._server: ThreadingHTTPServer | None = _Server(host, port, _handler(token, collectors))
        except OSError as error:
            log.warning("no metrics: the address cannot be had", host=host, port=port, error=str(error))
            self._server = None
            return
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()
        log.info("metrics", host=host, port=self.port)

    def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that breaks off is no news."""
        log.debug("a client of the metrics broke off", exc_info=True)


def _handler(token: str | None, collectors: tuple[Collector, ...]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT_S
        server_version = "mergemill"
        sys_version = ""

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != PATH:
                self._answer(HTTPStatus.NOT_FOUND, f"there is only {PATH}\n".encode())
            elif not may_read(self.client_address[0], self.headers.get, token):
                self._answer(HTTPStatus.FORBIDDEN, f"{REFUSAL}\n".encode())
            else:
                self._answer(HTTPStatus.OK, render(*collectors), CONTENT_TYPE)

        def do_HEAD(self) -> None:
            self.do_GET()

        def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
            log.debug("metrics request", client=self.client_address[0], line=format % args)

    return Handler
