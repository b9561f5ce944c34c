"""Domain errors to HTTP, once, as RFC 9457 problem details."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from workers.errors import (
    ConflictError,
    IllegalTransitionError,
    JobNotFoundError,
    JobStoreUnavailableError,
    MergemillError,
    ObjectNotFoundError,
    OutputConflictError,
    RecipeError,
    StoreError,
)

PROBLEM = "application/problem+json"

STATUS: Mapping[type[MergemillError], int] = {
    RecipeError: 422,
    JobNotFoundError: 404,
    IllegalTransitionError: 409,
    ConflictError: 409,
    OutputConflictError: 409,
    JobStoreUnavailableError: 503,
    ObjectNotFoundError: 404,
    StoreError: 502,
    MergemillError: 500,
}
"""The first entry that fits wins: the most specific come first."""

TITLES = {
    RecipeError: "The recipe cannot be merged",
    JobNotFoundError: "No such job",
    IllegalTransitionError: "Not possible in the job's state",
    ConflictError: "Changed at the same time",
    OutputConflictError: "The output is in use",
    JobStoreUnavailableError: "Job state is out of reach",
    ObjectNotFoundError: "No such file",
    StoreError: "The object store failed",
    MergemillError: "Internal error",
}

log = structlog.get_logger(__name__)


def problem(status: int, title: str, detail: str, code: str = "about:blank", **extra: Any) -> JSONResponse:
    """A problem details response."""
    body = {"type": code, "title": title, "status": status, "detail": detail, **extra}
    headers = {"Retry-After": "5"} if status == 503 else None
    return JSONResponse(body, status, headers, media_type=PROBLEM)


def from_error(error: MergemillError) -> JSONResponse:
    """The problem that a domain error is."""
    kind = next(kind for kind in STATUS if isinstance(error, kind))
    extra = {"errors": list(error.problems)} if isinstance(error, RecipeError) else {}
    return problem(STATUS[kind], TITLES[kind], str(error), f"urn:mergemill:error:{error.code}", **extra)


def install(app: FastAPI) -> None:
    """Answer every error of the application as a problem."""

    async def domain(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, MergemillError)  # noqa: S101 - what it is registered for
        return from_error(error)

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101
        answer = problem(error.status_code, str(error.detail), str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    async def validation(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        errors = [f"{'.'.join(str(step) for step in item['loc'])}: {item['msg']}" for item in error.errors()]
        return problem(
            422, "The request is not valid", "; ".join(errors), "urn:mergemill:error:request", errors=errors
        )

    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        log.error("unexpected error", method=request.method, path=request.url.path, exc_info=error)
        return problem(500, "Internal error", "something went wrong here; the log of the API tells more")

    app.add_exception_handler(MergemillError, domain)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(Exception, unexpected)
