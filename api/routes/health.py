"""``/healthz`` and ``/readyz``, for load balancers and orchestrators; under ``/v1`` too."""

from __future__ import annotations

from fastapi import APIRouter, Response

from api.deps import DeploymentDep, JobStoreDep, StoreProbeDep
from api.errors import from_error, problem
from api.openapi import problems
from api.readiness import look, missing
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
def readyz(jobs: JobStoreDep, deployment: DeploymentDep, store_probe: StoreProbeDep) -> Readiness | Response:
    """Whether jobs can be accepted, what each dependency says, and what about the deployment could lose jobs.

    Without compute jobs are accepted and wait: that is a check that is `missing`, and a warning, but not 503.
    """
    checks = look(deployment, store_probe)
    if gone := missing(checks):
        return problem(
            503,
            "Not ready",
            "; ".join(f"{name}: {why}" for name, why in gone.items()),
            f"urn:mergemill:error:{'job_store_unavailable' if 'redis' in gone else 'store_unavailable'}",
            missing=gone,
            checks=checks,
        )
    compute = checks["compute"]
    waiting = (f"compute: {compute.detail}",) if compute.state == "missing" else ()
    try:
        return Readiness(checks=checks, warnings=(*waiting, *jobs.durability_warnings()))
    except JobStoreUnavailableError as error:  # since we looked
        return from_error(error, missing={"redis": str(error)})
