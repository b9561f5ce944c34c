"""The application: ``create_app(settings)``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from api import errors
from api.routes import health, merges, methods, plans
from service.jobstore import JobStore
from service.settings import Settings
from workers.store import open_stores


def create_app(settings: Settings) -> FastAPI:
    """The REST API of one deployment."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.settings = settings
        app.state.store = open_stores(settings.store)
        with JobStore(settings.redis_url, settings.namespace) as jobs:
            app.state.jobs = jobs
            yield

    app = FastAPI(
        title="Mergemill",
        version=version("mergemill"),
        summary="Merge model checkpoints in object storage.",
        lifespan=lifespan,
    )
    errors.install(app)
    for module in (merges, plans, methods, health):
        app.include_router(module.router)
    return app
