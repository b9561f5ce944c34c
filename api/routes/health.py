"""``/healthz`` and ``/readyz``, for load balancers and orchestrators; under ``/v1`` too."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from api.deps import JobsDep
from workers.errors import JobStoreUnavailableError

router = APIRouter(tags=["health"])


@router.get("/healthz")
@router.get("/v1/healthz", include_in_schema=False)
def healthz() -> dict[str, str]:
    """This process answers."""
    return {"status": "ok"}


@router.get("/readyz")
@router.get("/v1/readyz", include_in_schema=False)
def readyz(response: Response, jobs: JobsDep) -> dict[str, Any]:
    """Whether jobs can be accepted, and what about the deployment could lose them."""
    try:
        jobs.ping()
        warnings = list(jobs.durability_warnings())
    except JobStoreUnavailableError as error:
        response.status_code = 503
        return {"status": "unavailable", "missing": {"redis": str(error)}, "warnings": []}
    return {"status": "ready", "missing": {}, "warnings": warnings}
