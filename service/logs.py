"""Logs of the API and the scheduler: one line an event on standard error, JSON or for a terminal, without secrets."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, Literal

import structlog

LogFormat = Literal["auto", "json", "console"]

HIDDEN = "***"
"""What stands in the place of a secret."""

_SECRET_KEY = re.compile(
    r"(?i)password|passwd|secret|token$|authorization|credential|access_key|api_key|cookie"
)
_SECRET_TEXT = (
    # user:password@ of a URL, also without a user (Redis)
    (re.compile(r"(?P<before>\w://[^\s/:@'\"]*:)[^\s/@'\"]+(?=@)"), rf"\g<before>{HIDDEN}"),
    # what makes a presigned URL work
    (
        re.compile(
            r"(?i)(?P<before>[?&](?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId)=)[^&\s'\"]+"
        ),
        rf"\g<before>{HIDDEN}",
    ),
    (re.compile(r"(?P<before>\bwhsec_)[A-Za-z0-9+/=_-]+"), rf"\g<before>{HIDDEN}"),
    (
        re.compile(r"(?i)(?P<before>\bauthorization['\"]?\s*[:=]\s*['\"]?(?:bearer |basic )?)[^\s'\",]+"),
        rf"\g<before>{HIDDEN}",
    ),
)

_QUIET = ("boto3", "botocore", "s3transfer", "urllib3", "httpx", "httpcore", "asyncio")
"""Libraries whose every request is nobody's business."""


def configure(log_format: LogFormat | str = "auto", level: int = logging.INFO) -> None:
    """Send all logs, the standard library's too, to standard error.

    :param log_format: ``json`` (one object a line), ``console``, or ``auto``: console on a terminal.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        hide_secrets,
    ]
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        if console
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, hide_secrets, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def hide_secrets(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: whatever is called a secret, or looks like one, becomes :data:`HIDDEN`."""
    return {key: _hide(key, value) for key, value in event.items()}


def hidden_text(text: str) -> str:
    """``text`` without passwords in URLs and without the signatures of presigned ones."""
    for pattern, replacement in _SECRET_TEXT:
        text = pattern.sub(replacement, text)
    return text


def _hide(key: object, value: Any) -> Any:
    if isinstance(key, str) and _SECRET_KEY.search(key) and not isinstance(value, bool | int | float | None):
        return HIDDEN
    if isinstance(value, str):
        return hidden_text(value)
    if isinstance(value, Mapping):
        return {name: _hide(name, item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(None, item) for item in value]
    if isinstance(value, BaseException):
        return hidden_text(f"{type(value).__name__}: {value}")
    return value
