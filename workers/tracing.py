"""Traces, by OpenTelemetry: a request's span, its job's, its tasks', and their stages', in whichever process each is.

They need the extra (``pip install mergemill[otel]``) and the environment variable ``OTEL_EXPORTER_OTLP_ENDPOINT``, or
the one for traces alone; all others of OpenTelemetry's count as well. Without them nothing is imported, and what is
called here does nothing. From process to process goes W3C's ``traceparent``: in the job's record and in a task's ids.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, Final, ParamSpec, TypeVar

from workers.redaction import hidden_text

ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Environment variables, of which one says where spans go."""

REASON_CHARS: Final = 300
"""Longest reason of a span that failed, in characters."""

Attributes = Mapping[str, str | int | float]

_P = ParamSpec("_P")
_R = TypeVar("_R")

log = logging.getLogger(__name__)


class Span:
    """Something that takes time; it may be begun in one thread and ended in another. Without tracing, nothing."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    @property
    def traceparent(self) -> str | None:
        """How another process names it as its parent."""
        if self._span is None:
            return None
        its = self._span.get_span_context()
        return f"00-{its.trace_id:032x}-{its.span_id:016x}-{its.trace_flags:02x}" if its.is_valid else None

    def set(self, attributes: Attributes, name: str | None = None) -> None:
        """Say more about it."""
        if self._span is not None:
            self._span.set_attributes(dict(attributes))
            if name is not None:
                self._span.update_name(name)

    def active(self) -> AbstractContextManager[Any]:
        """A block whose spans are within this one; the block's end does not end it."""
        if self._span is None:
            return nullcontext()
        from opentelemetry import trace  # noqa: PLC0415 - only where there are traces

        return trace.use_span(self._span, record_exception=False, set_status_on_exception=False)

    def end(self, error: BaseException | None = None) -> None:
        """It is over, because of ``error`` if there is one."""
        if self._span is None:
            return
        if error is not None:
            from opentelemetry.trace import Status, StatusCode  # noqa: PLC0415 - as above

            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(Status(StatusCode.ERROR, hidden_text(str(error))[:REASON_CHARS]))
        self._span.end()


OFF: Final = Span()
"""No span."""


class _Tracing:
    """This process's tracer, when it has one."""

    def __init__(self) -> None:
        self.configured = False
        self.tracer: Any = None

    def use(self, provider: Any) -> None:
        """Make spans with this provider from now on; ``None`` makes none."""
        self.configured = True
        self.tracer = None if provider is None else provider.get_tracer("mergemill")


_tracing = _Tracing()
use = _tracing.use


def configure(role: str) -> None:
    """Send this process's spans where the environment says, if it says so; only the first call counts.

    :param role: what the process is, for its service name, unless ``OTEL_SERVICE_NAME`` is set.
    """
    if _tracing.configured:
        return
    _tracing.configured = True
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError as error:
        log.warning("no traces: %s; pip install 'mergemill[otel]'", error)
        return
    own = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": f"mergemill-{role}"}
    provider = TracerProvider(resource=Resource.create(own))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    use(provider)


def begin(
    name: str, attributes: Attributes | None = None, parent: str | None = None, *, server: bool = False
) -> Span:
    """A span that its caller ends.

    :param parent: the ``traceparent`` of another process; else what is active here.
    :param server: whether it answers a request.
    """
    if _tracing.tracer is None:
        return OFF
    from opentelemetry.trace import SpanKind  # noqa: PLC0415 - only where there are traces

    kind = SpanKind.SERVER if server else SpanKind.INTERNAL
    return Span(_tracing.tracer.start_span(name, _context(parent), kind, dict(attributes or {})))


@contextmanager
def span(
    name: str, attributes: Attributes | None = None, parent: str | None = None, *, server: bool = False
) -> Iterator[Span]:
    """A span around a block; see :func:`begin`. What the block raises ends it."""
    made = begin(name, attributes, parent, server=server)
    try:
        with made.active():
            yield made
    except BaseException as error:
        made.end(error)
        raise
    made.end()


def traced(name: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Put a span around every call of a function."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with span(name):
                return function(*args, **kwargs)

        return call

    return decorate


def adopt(parent: str | None) -> None:
    """Make what comes in this context, of :mod:`contextvars`, a part of another process's span."""
    if parent is not None and _tracing.tracer is not None:
        from opentelemetry import context  # noqa: PLC0415 - only where there are traces

        context.attach(_context(parent))


def traceparent() -> str | None:
    """How another process names the active span as its parent."""
    if _tracing.tracer is None:
        return None
    from opentelemetry import trace  # noqa: PLC0415 - only where there are traces

    return Span(trace.get_current_span()).traceparent


def _context(parent: str | None) -> Any:
    if parent is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

    return TraceContextTextMapPropagator().extract({"traceparent": parent})
