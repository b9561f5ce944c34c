"""Logs of the API and the scheduler: one line an event on standard error, JSON or for a terminal, without secrets."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

from workers.logs import StandardErrorHandler
from workers.redaction import hide_secrets

LogFormat = Literal["auto", "json", "console"]

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
    handler = StandardErrorHandler()
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
