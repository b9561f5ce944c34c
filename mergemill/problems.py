"""What is wrong, from what a service answers or does not: the errors that the client raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import httpx

from workers.errors import (
    ConflictError,
    ForbiddenError,
    JobNotFoundError,
    JobStoreUnavailableError,
    MalformedRequestError,
    MergemillError,
    RecipeError,
    RequestTooLargeError,
    ServiceUnavailableError,
    TooManyRequestsError,
    UnauthenticatedError,
    UnsupportedMediaTypeError,
    from_json,
)

_PROBLEM: Final = "urn:mergemill:error:"
_BY_STATUS: Mapping[int, type[MergemillError]] = {
    400: MalformedRequestError,
    401: UnauthenticatedError,
    403: ForbiddenError,
    404: JobNotFoundError,
    409: ConflictError,
    413: RequestTooLargeError,
    415: UnsupportedMediaTypeError,
    422: RecipeError,
    429: TooManyRequestsError,
    503: JobStoreUnavailableError,
}


def unreachable(url: str, error: httpx.HTTPError) -> ServiceUnavailableError:
    """The error that no answer stands for."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ServiceUnavailableError(
            f"no Mergemill service answers at {url} ({error}): start one with `mergemill up`, or name another "
            "with --url or MERGEMILL_URL"
        )
    why = str(error) or type(error).__name__
    return ServiceUnavailableError(f"the Mergemill service at {url} did not answer: {why}")


def problem_of(response: httpx.Response) -> MergemillError:
    """The error that an RFC 9457 problem stands for."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict):
        return MergemillError(
            f"{response.request.url} answered {response.status_code} {response.reason_phrase}"
        )
    detail = str(body.get("detail") or body.get("title") or response.reason_phrase)
    problems = body.get("errors")
    kind = str(body.get("type", ""))
    if kind.startswith(_PROBLEM) and kind != f"{_PROBLEM}request":
        name = "".join(word.capitalize() for word in kind.removeprefix(_PROBLEM).split("_")) + "Error"
        found = from_json({"type": name, "detail": detail, "problems": problems})
        if type(found) is not MergemillError:
            return found
    status = response.status_code
    if status == 422:
        return RecipeError(*(map(str, problems) if isinstance(problems, list) else [detail]))
    return _BY_STATUS.get(status, MergemillError)(f"{detail} (HTTP {status} from {response.request.url})")
