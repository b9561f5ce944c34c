"""Mergemill's Python client and command line: ``from mergemill import Client``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergemill.client import Client as Client
    from mergemill.events import Event as Event
    from mergemill.jobs import File as File
    from mergemill.jobs import Job as Job
    from mergemill.jobs import JobPage as JobPage
    from mergemill.jobs import Progress as Progress

__all__ = ["Client", "Event", "File", "Job", "JobPage", "Progress"]

_HOMES = {
    "Client": "mergemill.client",
    "Event": "mergemill.events",
    **dict.fromkeys(("File", "Job", "JobPage", "Progress"), "mergemill.jobs"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: ``mergemill --help`` has no use for an HTTP client."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
