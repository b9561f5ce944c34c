"""Domain errors to HTTP, once, as RFC 9457 problem details."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from api.observing import request_id
from api.openapi import PROBLEM
from api.schemas import Problem, RecipeQuery
from service.recipe import key_hint
from workers.errors import (
    ConflictError,
    CursorError,
    ForbiddenError,
    IdempotencyMismatchError,
    IllegalTransitionError,
    JobNotFoundError,
    JobStoreUnavailableError,
    MalformedRequestError,
    MergemillError,
    NotReadyError,
    ObjectNotFoundError,
    OutputConflictError,
    OutputReplacedError,
    RecipeError,
    RequestTimeoutError,
    RequestTooLargeError,
    StoreError,
    TooManyRequestsError,
    UnauthenticatedError,
    UnsupportedMediaTypeError,
)

ANSWERS: Mapping[type[MergemillError], tuple[int, str]] = {
    RecipeError: (422, "The recipe cannot be merged"),
    CursorError: (400, "No such page"),
    MalformedRequestError: (400, "The request cannot be read"),
    IdempotencyMismatchError: (422, "Another request had this Idempotency-Key"),
    RequestTimeoutError: (408, "The request did not come to an end"),
    RequestTooLargeError: (413, "The request is too long"),
    UnauthenticatedError: (401, "No good API key"),
    ForbiddenError: (403, "Not allowed to this API key"),
    TooManyRequestsError: (429, "Too many requests"),
    UnsupportedMediaTypeError: (415, "Not a content type that is read"),
    JobNotFoundError: (404, "No such job"),
    NotReadyError: (409, "The job has no files yet"),
    OutputReplacedError: (410, "The output was replaced"),
    IllegalTransitionError: (409, "Not possible in the job's state"),
    ConflictError: (409, "Changed at the same time"),
    OutputConflictError: (409, "The output is in use"),
    JobStoreUnavailableError: (503, "Job state is out of reach"),
    ObjectNotFoundError: (404, "No such file"),
    StoreError: (502, "The object store failed"),
    MergemillError: (500, "Internal error"),
}
"""Status and title. The first entry that fits wins: the most specific come first."""

_HEADERS = {401: {"WWW-Authenticate": 'Bearer realm="mergemill"'}, 503: {"Retry-After": "5"}}

log = structlog.get_logger(__name__)


class ProblemResponse(JSONResponse):
    """A problem on the wire."""

    media_type = PROBLEM

    def render(self, content: Any) -> bytes:
        """JSON; a lone surrogate (in a file name that is not UTF-8) becomes its escape, which is JSON as well."""
        return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")


def problem(
    status: int, title: str, detail: str, code: str = "about:blank", **members: Any
) -> ProblemResponse:
    """A problem details response; ``members`` are the further ones of :class:`~api.schemas.Problem`."""
    body = Problem(type=code, title=title, status=status, detail=detail, request_id=request_id(), **members)
    return ProblemResponse(body.model_dump(exclude_none=True), status, _HEADERS.get(status))


def from_error(error: MergemillError, **members: Any) -> ProblemResponse:
    """The problem that a domain error is."""
    status, title = next(answer for kind, answer in ANSWERS.items() if isinstance(error, kind))
    if isinstance(error, RecipeError | ForbiddenError):
        members["errors"] = error.problems
    answer = problem(status, title, str(error), f"urn:mergemill:error:{error.code}", **members)
    if isinstance(error, TooManyRequestsError):
        answer.headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    return answer


def _sentence(item: Mapping[str, Any]) -> str:
    """What is wrong with one parameter of a request."""
    where = ".".join(str(step) for step in item["loc"])
    if item["type"] == "extra_forbidden":
        return f"{where}: is not a parameter{key_hint(item['loc'][-1], RecipeQuery.model_fields)}"
    return f"{where}: {item['msg']}"


def install(app: FastAPI) -> None:
    """Answer every error of the application as a problem."""

    async def domain(request: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, MergemillError)  # noqa: S101 - what it is registered for
        answer = from_error(error)
        answer.headers.update(getattr(request.state, "rate_limit", {}))
        return answer

    async def http(_: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, HTTPException)  # noqa: S101
        answer = problem(error.status_code, str(error.detail), str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    async def validation(_: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, RequestValidationError)  # noqa: S101
        errors = [_sentence(item) for item in error.errors()]
        return problem(
            422, "The request is not valid", "; ".join(errors), "urn:mergemill:error:request", errors=errors
        )

    async def unexpected(request: Request, error: Exception) -> ProblemResponse:
        log.error("unexpected error", method=request.method, path=request.url.path, exc_info=error)
        return problem(500, "Internal error", "something went wrong here; the log of the API tells more")

    app.add_exception_handler(MergemillError, domain)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(Exception, unexpected)
