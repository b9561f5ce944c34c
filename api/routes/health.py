"""``/healthz`` and ``/readyz``, for load balancers and orchestrators; under ``/v1`` too."""

from __future__ import annotations

from fastapi import APIRouter, Response

from api.deps import JobStoreDep
from api.errors import from_error
from api.openapi import problems
from api.routing import readable
from api.schemas import Liveness, Readiness
from workers.errors import JobStoreUnavailableError

router = APIRouter(tags=["health"])


@readable(router, "/healthz", response_model=Liveness)
@readable(router, "/v1/healthz", response_model=Liveness, include_in_schema=False)
async def healthz() -> Liveness:
    """This process answers, however busy its threads are."""
    return Liveness()


@readable(router, "/readyz", response_model=Readiness, responses=problems(503))
@readable(router, "/v1/readyz", response_model=Readiness, include_in_schema=False)
def readyz(jobs: JobStoreDep) -> Readiness | Response:
    """Whether jobs can be accepted, and what about the deployment could lose them."""
    try:
        jobs.ping()
        return Readiness(warnings=jobs.durability_warnings())
    except JobStoreUnavailableError as error:
        return from_error(error, missing={"redis": str(error)})
