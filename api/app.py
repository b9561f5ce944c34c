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
from api.routes import health, merges, methods, plans
from service.jobstore import JobStore
from service.keystore import KeyStore
from service.settings import Settings
from workers.store import open_stores

PLAN_THREADS = 4
"""Plans made at once. They wait for object storage, and may not take the threads that answer everything else."""


def create_app(settings: Settings) -> FastAPI:
    """The REST API of one deployment."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.settings = settings
        app.state.plan_limiter = CapacityLimiter(PLAN_THREADS)
        with (
            closing(open_stores(settings.store)) as store,
            JobStore(settings.redis_url, settings.namespace) as jobs,
            KeyStore(settings.redis_url, settings.namespace) as keys,
        ):
            app.state.store = store
            app.state.jobs = jobs
            app.state.keys = keys
            yield

    app = Application(
        title="Mergemill",
        version=version("mergemill"),
        summary="Merge model checkpoints in object storage.",
        lifespan=lifespan,
    )
    errors.install(app)
    for module in (merges, plans, methods):
        answers = problems(401, 403, 429, 503)
        app.include_router(module.router, dependencies=[Depends(caller_of)], responses=answers)
    app.include_router(health.router)  # for those who have no key, and need none
    return app
