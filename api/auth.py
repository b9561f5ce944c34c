"""Who asks: API keys as bearer tokens (RFC 6750), what they are for, and how often they may ask.

Every router but that of the health checks is included with :func:`caller_of`, so that a route is closed unless
somebody opens it: GET and HEAD need the scope ``read``, everything else ``submit``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Annotated, Final

from fastapi import Depends, Request, Response, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.deps import JobStoreDep, KeysDep, SettingsDep
from service.jobs.ownjobs import OwnJobs
from service.keys import ANYBODY, ApiKey, Scope, is_secret_of, split_token
from service.keystore import Admission, KeyStore
from workers.errors import (
    ForbiddenError,
    JobStoreUnavailableError,
    TooManyRequestsError,
    UnauthenticatedError,
)

_LOOKING: Final = ("GET", "HEAD")

_scheme = HTTPBearer(
    scheme_name="ApiKey",
    description="An API key, `mm_<id>_<secret>`, as `mergemill keys create` prints it.",
    auto_error=False,  # what it says itself is no problem of RFC 9457
)


def caller_of(
    request: Request,
    response: Response,
    settings: SettingsDep,
    keys: KeysDep,
    _: Annotated[HTTPAuthorizationCredentials | None, Security(_scheme)],
) -> ApiKey:
    """The key that a request comes with.

    :raises UnauthenticatedError: none, or one that is no good.
    :raises TooManyRequestsError: it has asked too often.
    :raises ForbiddenError: it is not for this.
    """
    if settings.auth == "off":
        return ANYBODY
    key = _authenticated(request.headers.getlist("authorization"), keys)
    admission = keys.admit(key.id, settings.limits.with_own(key.limits))
    request.state.rate_limit = _headers(admission)  # for errors, which do not go through `response`
    response.headers.update(request.state.rate_limit)
    if not admission.admitted:
        raise TooManyRequestsError(
            f"the key {key.id} may ask {settings.limits.with_own(key.limits).requests_per_second:g} times a second",
            admission.retry_s,
        )
    scope = Scope.READ if request.method in _LOOKING else Scope.SUBMIT
    if not key.allows(scope):
        raise ForbiddenError(f"the key {key.id} lacks the scope {scope}")
    return key


def still_good(caller: ApiKey, keys: KeyStore) -> bool:
    """Whether the key of a request that was taken would still be taken; no, where nobody can tell."""
    if caller is ANYBODY:
        return True
    try:
        key = keys.get(caller.id)
    except JobStoreUnavailableError:
        return False
    return key is not None and key.ended(time.time()) is None


CallerDep = Annotated[ApiKey, Depends(caller_of)]


async def jobs_of(caller: CallerDep, settings: SettingsDep, jobs: JobStoreDep) -> OwnJobs:
    """The jobs that the caller may know of."""
    return OwnJobs(jobs, caller, settings.limits.with_own(caller.limits))


JobsDep = Annotated[OwnJobs, Depends(jobs_of)]


def _authenticated(given: Sequence[str], keys: KeyStore) -> ApiKey:
    """The key that these Authorization headers hold.

    A key that there is none of takes the same reads and the same comparison as one whose secret is wrong.
    """
    kind, _, token = (given[0] if len(given) == 1 else "").strip().partition(" ")
    found = split_token(token.strip()) if kind.lower() == "bearer" else None
    if found is None:
        raise UnauthenticatedError(
            "this needs an API key, as the header `Authorization: Bearer mm_...` (for the client and the command line, "
            "set MERGEMILL_API_KEY); whoever runs the service makes keys with `mergemill keys create`"
        )
    name, secret = found
    key = keys.get(name)
    if not is_secret_of(secret, key) or key is None:
        raise UnauthenticatedError("the API key is none of this service's")
    if ended := key.ended(time.time()):
        raise UnauthenticatedError(f"the API key {key.id} {ended}")
    return key


def _headers(admission: Admission) -> dict[str, str]:
    if not admission.limit:
        return {}
    return {
        "RateLimit-Limit": str(admission.limit),
        "RateLimit-Remaining": str(admission.remaining),
        "RateLimit-Reset": str(math.ceil(admission.reset_s)),
    }
