"""Posting to strangers: only where it is allowed, never beyond a deadline, and reading no more than the status.

The address is checked when the connection is made, on the very address that is connected to: a name that
resolves to something else by then (DNS rebinding) is refused all the same. Redirects are not followed, and
proxies of the environment are not used.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import httpcore
import httpx

from service.webhooks.addresses import Destinations

DEADLINE_S: Final = 15.0
"""Longest time that one request may take, from the look-up of the name to the status, in seconds."""


class RefusedError(Exception):
    """There may be no connection to this place."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request."""

    status: int | None
    """The HTTP status, if there was an answer."""
    error: str | None
    """Why there was none, or why it is not a good one."""


class _Deadline:
    """A moment, and the time that is left until then."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def left(self, error: type[Exception]) -> float:
        """How long an operation may still take, in seconds; raises ``error`` when none is left."""
        left = self._at - time.monotonic()
        if left <= 0:
            raise error
        return left


class _Stream(httpcore.NetworkStream):
    """A connection whose every operation ends by the deadline: a drop every few seconds does not keep it open."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._deadline.left(httpcore.WriteTimeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(httpcore.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Backend(httpcore.NetworkBackend):
    """Connects to addresses that may be connected to."""

    def __init__(self, scheme: str, destinations: Destinations, deadline: _Deadline) -> None:
        self._scheme = scheme
        self._destinations = destinations
        self._deadline = deadline
        self._sockets = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        addresses = _resolve(host, port)
        refusals = [self._destinations.refusal(self._scheme, host, address) for address in addresses]
        allowed = [address for address, no in zip(addresses, refusals, strict=True) if no is None]
        if not allowed:
            raise RefusedError(f"no connection to {host}: {refusals[0]}")
        for number, address in enumerate(allowed, start=1):
            left = self._deadline.left(httpcore.ConnectTimeout)
            try:
                found = self._sockets.connect_tcp(address, port, left / (len(allowed) - number + 1))
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if number == len(allowed):
                    raise
            else:
                return _Stream(found, self._deadline)
        raise AssertionError  # the last one returns or raises


def post(
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    destinations: Destinations,
    deadline_s: float = DEADLINE_S,
) -> Answer:
    """POST a body, and read the answer's status but nothing else of it. Never raises for what others do."""
    target = httpx.URL(url)
    deadline = _Deadline(deadline_s)
    given = {
        "Host": target.netloc.decode(),
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    backend = _Backend(target.scheme, destinations, deadline)
    try:
        with (
            httpcore.ConnectionPool(ssl_context=_tls(), network_backend=backend, retries=0) as pool,
            pool.stream(
                "POST",
                httpcore.URL(
                    scheme=target.raw_scheme, host=target.raw_host, port=target.port, target=target.raw_path
                ),
                headers=list(given.items()),
                content=body,
            ) as response,
        ):
            status = response.status
    except RefusedError as error:
        return Answer(None, str(error))
    except (
        httpcore.TimeoutException,
        httpcore.NetworkError,
        httpcore.ProtocolError,
        OSError,
        UnicodeError,
    ) as error:
        return Answer(None, _why(error))
    return Answer(status, None if 200 <= status < 300 else f"the answer was {status}")


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _why(error: BaseException) -> str:
    """What went wrong, without what a stranger has sent."""
    if isinstance(error, httpcore.TimeoutException):
        return "it took too long"
    if isinstance(error, socket.gaierror):
        return "its host name is not known"
    if isinstance(error, httpcore.ProtocolError):
        return "the connection broke off, or does not speak HTTP"
    return str(error)[:200] or type(error).__name__


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()
