"""Around every request: its id, its place in the logs, its count and its time, and its span in a trace."""

from __future__ import annotations

import re
import secrets
import time
from contextlib import nullcontext
from typing import Any, Final

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.watching import metrics
from workers import tracing

HEADER: Final = "X-Request-Id"
"""Names the request, in either direction."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
"""What a request id of somebody else's may look like: it goes into logs, records and answers."""

MAX_PATH: Final = 200
"""Longest path that is logged, in characters."""

_METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
"""Methods that are counted by name."""

_QUIET: Final = frozenset(("/healthz", "/readyz", "/v1/healthz", "/v1/readyz", "/metrics"))
"""Routes that machines ask for every few seconds: a success is not logged."""

log = structlog.get_logger(__name__)


def new_request_id() -> str:
    """A request id that nobody else has."""
    return secrets.token_hex(12)


def request_id() -> str | None:
    """The id of the request that is being answered, if one is."""
    found: str | None = structlog.contextvars.get_contextvars().get("request")
    return found


def origin() -> dict[str, str]:
    """What a job remembers of the request that it came from."""
    known = {"request": request_id(), "traceparent": tracing.traceparent()}
    return {name: value for name, value in known.items() if value is not None}


def accepted(given: str | None) -> str:
    """The id that a client gave its request, if it may be used, else a fresh one."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else new_request_id()


class Observing:
    """ASGI middleware, outside of all others: what they answer is seen, errors that nobody expected too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.perf_counter()
        headers = Headers(scope=scope)
        identity = accepted(headers.get(HEADER))
        about, parent = {"mergemill.request": identity}, headers.get("traceparent")
        quiet = scope["path"] in _QUIET
        with (
            structlog.contextvars.bound_contextvars(request=identity),
            nullcontext(tracing.OFF)
            if quiet
            else tracing.span("request", about, parent, server=True) as span,
        ):

            async def observed(message: Message) -> None:
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message)[HEADER] = identity
                    _answered(scope, message["status"], time.perf_counter() - begun, span)
                await send(message)

            await self._app(scope, receive, observed)


def _answered(scope: Scope, status: int, seconds: float, span: tracing.Span) -> None:
    """Count, trace and log an answer that begins: the rest of it may take as long as its reader likes."""
    method = scope["method"] if scope["method"] in _METHODS else metrics.OTHER
    route = _template(scope)
    metrics.HTTP_REQUESTS.labels(method, route, str(status)).inc()
    metrics.HTTP_SECONDS.labels(method, route).observe(seconds)
    told = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
    span.set(told, f"{method} {route}")
    if route in _QUIET and status < 400:
        return
    about: dict[str, Any] = {"job": job} if (job := scope.get("path_params", {}).get("job")) else {}
    raw: bytes = scope.get("raw_path") or b""  # still escaped: one line is one event
    path = raw[:MAX_PATH].decode("ascii", "replace")
    log.info(
        "request",
        method=method,
        path=path,
        route=route,
        status=status,
        seconds=round(seconds, 6),
        **about,
    )


def _template(scope: Scope) -> str:
    """The route's template, such as ``/v1/merges/{job}``: of paths there is no end."""
    found = getattr(scope.get("route"), "path", None)
    return found if isinstance(found, str) else metrics.OTHER
