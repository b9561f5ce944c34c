"""The application: ``create_app(settings)``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from importlib.metadata import version

from anyio import CapacityLimiter
from fastapi import Depends, FastAPI

from api import errors
from api.auth import caller_of
from api.openapi import Application, problems
from api.readiness import StoreProbe
from api.routes import deliveries, events, health, merges, methods, metrics, plans
from api.streams import streaming
from service.jobs.jobstore import JobStore
from service.jobs.sweepstore import SweepStore
from service.keystore import KeyStore
from service.settings import Settings
from service.watching.deployment import Deployment
from service.webhooks.store import WebhookStore
from workers import tracing
from workers.store import open_stores

PLAN_THREADS = 4
"""Plans made at once. They wait for object storage, and may not take the threads that answer everything else."""


def create_app(settings: Settings) -> FastAPI:
    """The REST API of one deployment."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tracing.configure("api")
        app.state.settings = settings
        app.state.plan_limiter = CapacityLimiter(PLAN_THREADS)
        with (
            closing(open_stores(settings.store)) as store,
            JobStore(settings.redis_url, settings.namespace) as jobs,
            KeyStore(settings.redis_url, settings.namespace) as app.state.keys,
            WebhookStore(settings.redis_url, settings.namespace) as app.state.webhooks,
            SweepStore(settings.redis_url, settings.namespace) as app.state.sweeps,
            Deployment(settings.redis_url, settings.namespace) as deployment,
            StoreProbe(store, settings.model_roots) as store_probe,
        ):
            app.state.store = store
            app.state.jobs = jobs
            app.state.deployment = deployment
            app.state.store_probe = store_probe
            async with streaming(settings.redis_url, settings.namespace) as app.state.streams:
                yield

    app = Application(
        title="Mergemill",
        version=version("mergemill"),
        summary="Merge model checkpoints in object storage.",
        lifespan=lifespan,
    )
    errors.install(app)
    for module in (merges, events, deliveries, plans, methods):
        answers = problems(401, 403, 429, 503)
        app.include_router(module.router, dependencies=[Depends(caller_of)], responses=answers)
    for module in (
        health,
        metrics,
    ):  # for those who have no key: one tells nothing of jobs, one has its own token
        app.include_router(module.router)
    return app
