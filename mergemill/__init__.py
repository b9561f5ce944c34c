"""Mergemill's Python client and command line: ``from mergemill import Client``.

What it raises is a :class:`MergemillError`; the whole tree stands at the top of :mod:`workers.errors`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergemill.client import Client as Client
    from mergemill.events import Event as Event
    from mergemill.jobs import File as File
    from mergemill.jobs import Job as Job
    from mergemill.jobs import JobPage as JobPage
    from service.jobs.progress import Progress as Progress
    from workers.errors import AccessDeniedError as AccessDeniedError
    from workers.errors import AlreadyExistsError as AlreadyExistsError
    from workers.errors import JobCancelledError as JobCancelledError
    from workers.errors import JobError as JobError
    from workers.errors import JobFailedError as JobFailedError
    from workers.errors import JobNotFoundError as JobNotFoundError
    from workers.errors import JobTimeoutError as JobTimeoutError
    from workers.errors import MergemillError as MergemillError
    from workers.errors import NonFiniteError as NonFiniteError
    from workers.errors import NotReadyError as NotReadyError
    from workers.errors import OutputConflictError as OutputConflictError
    from workers.errors import OutputReplacedError as OutputReplacedError
    from workers.errors import PlanError as PlanError
    from workers.errors import RecipeError as RecipeError
    from workers.errors import RequestError as RequestError
    from workers.errors import ServiceUnavailableError as ServiceUnavailableError
    from workers.errors import StoreError as StoreError
    from workers.errors import StoreUnavailableError as StoreUnavailableError

_JOBS = ("File", "Job", "JobPage")
_ERRORS = (
    "AccessDeniedError", "AlreadyExistsError", "JobCancelledError", "JobError", "JobFailedError", "JobNotFoundError",
    "JobTimeoutError", "MergemillError", "NonFiniteError", "NotReadyError", "OutputConflictError",
    "OutputReplacedError", "PlanError", "RecipeError", "RequestError", "ServiceUnavailableError", "StoreError",
    "StoreUnavailableError",
)  # fmt: skip

__all__ = ["Client", "Event", "Progress", *_JOBS, *_ERRORS]  # noqa: PLE0604 - all of them are texts

_HOMES = {
    "Client": "mergemill.client",
    "Event": "mergemill.events",
    "Progress": "service.jobs.progress",
    **dict.fromkeys(_JOBS, "mergemill.jobs"),
    **dict.fromkeys(_ERRORS, "workers.errors"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: ``mergemill --help`` has no use for an HTTP client."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
