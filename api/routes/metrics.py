"""``/metrics``, for Prometheus: what this process counts, and what all of the deployment shares."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from api.deps import DeploymentDep, SettingsDep
from api.errors import problem
from api.routing import readable
from service.watching import metrics
from service.watching.metrics_server import PATH, REFUSAL, may_read

router = APIRouter(tags=["health"])


@readable(router, PATH, include_in_schema=False)
def show(request: Request, settings: SettingsDep, deployment: DeploymentDep) -> Response:
    """Metrics in Prometheus' text format."""
    token = settings.metrics_token.get_secret_value() if settings.metrics_token else None
    peer = request.client.host if request.client else None
    if not may_read(peer, request.headers.get, token):
        return problem(403, "Forbidden", REFUSAL)
    body = metrics.render(metrics.API, metrics.DeploymentCollector(deployment))
    return Response(body, media_type=metrics.CONTENT_TYPE)
