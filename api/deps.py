"""What the routes share: settings, job state and stores, made once for each application."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from anyio import CapacityLimiter
from fastapi import Depends, Request
from pydantic import ValidationError

from api.readiness import StoreProbe
from api.schemas import OptionsBody
from api.streams import Streams
from service.jobs.jobstore import JobStore
from service.jobs.sweepstore import SweepStore
from service.keystore import KeyStore
from service.planning.plan import PlanOptions
from service.recipe import validation_problems
from service.settings import Settings
from service.watching.deployment import Deployment
from service.webhooks.store import WebhookStore
from workers.errors import RecipeError
from workers.store.base import ObjectStore


async def settings_of(request: Request) -> Settings:
    """The deployment's settings."""
    found: Settings = request.app.state.settings
    return found


async def job_store_of(request: Request) -> JobStore:
    """Job state, everybody's: for what answers whoever asks."""
    found: JobStore = request.app.state.jobs
    return found


async def keys_of(request: Request) -> KeyStore:
    """The API keys."""
    found: KeyStore = request.app.state.keys
    return found


async def store_of(request: Request) -> ObjectStore:
    """Object storage."""
    found: ObjectStore = request.app.state.store
    return found


async def plan_limiter_of(request: Request) -> CapacityLimiter:
    """How many plans may be made at once."""
    found: CapacityLimiter = request.app.state.plan_limiter
    return found


async def deployment_of(request: Request) -> Deployment:
    """What is known of the whole deployment."""
    found: Deployment = request.app.state.deployment
    return found


async def store_probe_of(request: Request) -> StoreProbe:
    """Whether the store answers."""
    found: StoreProbe = request.app.state.store_probe
    return found


async def webhooks_of(request: Request) -> WebhookStore:
    """Webhooks."""
    found: WebhookStore = request.app.state.webhooks
    return found


async def sweeps_of(request: Request) -> SweepStore:
    """Jobs that have ended."""
    found: SweepStore = request.app.state.sweeps
    return found


async def streams_of(request: Request) -> Streams:
    """Event streams."""
    found: Streams = request.app.state.streams
    return found


SettingsDep = Annotated[Settings, Depends(settings_of)]
JobStoreDep = Annotated[JobStore, Depends(job_store_of)]
KeysDep = Annotated[KeyStore, Depends(keys_of)]
WebhooksDep = Annotated[WebhookStore, Depends(webhooks_of)]
SweepsDep = Annotated[SweepStore, Depends(sweeps_of)]
StreamsDep = Annotated[Streams, Depends(streams_of)]
StoreDep = Annotated[ObjectStore, Depends(store_of)]
DeploymentDep = Annotated[Deployment, Depends(deployment_of)]
StoreProbeDep = Annotated[StoreProbe, Depends(store_probe_of)]
PlanLimiterDep = Annotated[CapacityLimiter, Depends(plan_limiter_of)]


def plan_options(settings: Settings, body: OptionsBody) -> PlanOptions:
    """The request's options over the deployment's defaults.

    :raises RecipeError: a value is out of range, or above what the deployment allows.
    """
    given: Mapping[str, Any] = {name: value for name, value in body if value is not None}
    try:
        options = PlanOptions.model_validate({**settings.default_options.model_dump(), **given})
    except ValidationError as error:
        raise RecipeError(*(f"options.{problem}" for problem in validation_problems(error))) from error
    if options.worker_memory_bytes > settings.worker_memory_bytes:
        raise RecipeError(
            f"options.worker_memory_bytes: this service allows at most {settings.worker_memory_bytes}"
        )
    return options
