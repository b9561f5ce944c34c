"""Logs of a worker process: JSON lines on standard error, each with the ids of the task that it is about."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TextIO

import structlog

from workers.redaction import hide_secrets


class StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to what is standard error when there is something to write: whoever embeds us may replace it."""

    @property
    def stream(self) -> TextIO:
        """Standard error."""
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        """Nothing: its base class would keep what is standard error now."""


def configure() -> None:
    """Send this process's logs to standard error, unless somebody has already said where they go."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = StandardErrorHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.format_exc_info,
            ],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                hide_secrets,
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    root.addHandler(handler)
    logging.getLogger("workers").setLevel(logging.INFO)


def about(ids: Mapping[str, str]) -> None:
    """Name these ids in everything that is logged in this context from now on."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**ids)
