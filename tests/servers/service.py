"""Fixture: the whole service on real parts, with its API on a port. A pytest plugin.

API and scheduler run in threads of the test process, where a test can look at them; Valkey and Ray are
processes. Tests that kill things use :class:`mergemill.stack.EmbeddedStack` instead.
"""

from __future__ import annotations

import asyncio
import io
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from api.app import create_app
from api.server import Server
from mergemill.credentials import BearerAuth
from service.cluster.driver import Driver
from service.jobs.jobstore import JobStore
from service.running.scheduler import Scheduler
from service.settings import Settings
from tests.servers.keys import make_key
from workers.store import StoreSettings
from workers.task import PartResult

DEADLINE_S = 100.0
"""How long a job of a test may take; shorter than a test may."""

JSON = dict[str, Any]


class RunningService:
    """A service that answers on a port."""

    def __init__(self, url: str, jobs: JobStore, settings: Settings, api_key: str) -> None:
        self.url = url
        self.jobs = jobs
        self.settings = settings
        self.api_key = api_key
        self.http = httpx.Client(base_url=url, timeout=30, auth=BearerAuth(url, api_key))

    def submit(self, recipe: JSON, output: str, **options: Any) -> JSON:
        """Post a merge that is accepted; the job."""
        body = {"recipe": recipe, "output": output, "options": options}
        answer = self.http.post("/v1/merges", json=body)
        assert answer.status_code == 202, answer.text
        found: JSON = answer.json()
        return found

    def get(self, job: str) -> JSON:
        """The job as it stands."""
        found: JSON = self.http.get(f"/v1/merges/{job}").raise_for_status().json()
        return found

    def wait(self, job: str, *states: str) -> JSON:
        """Wait until the job is in one of these states, or has ended."""
        wanted = {*states, "succeeded", "failed", "cancelled"}
        deadline = time.monotonic() + DEADLINE_S
        while (found := self.get(job))["state"] not in wanted:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def merge(self, recipe: JSON, output: str, **options: Any) -> JSON:
        """Submit a merge that succeeds; the job."""
        done = self.wait(self.submit(recipe, output, **options)["id"])
        assert done["state"] == "succeeded", done["error"]
        return done

    def failure(self, recipe: JSON, output: str, **options: Any) -> str:
        """Submit a merge that fails after it was accepted; everything that its error says."""
        done = self.wait(self.submit(recipe, output, **options)["id"])
        assert done["state"] == "failed", done
        return "\n".join(done["error"].get("problems", [done["error"]["detail"]]))

    def parts(self, job: str) -> dict[str, PartResult]:
        """What is recorded about the job's parts."""
        return self.jobs.parts(job)


@contextmanager
def running_service(
    redis_url: str, driver: Driver, store: StoreSettings | None = None, **settings: Any
) -> Iterator[RunningService]:
    """API and scheduler on a namespace of their own."""
    chosen = Settings(
        redis_url=redis_url,
        namespace=f"test-{uuid.uuid4().hex}",
        store=store or StoreSettings(),
        **{"poll_seconds": 0.1, "progress_seconds": 0.5, "lease_seconds": 5.0, **settings},
    )
    config = uvicorn.Config(
        create_app(chosen), host="127.0.0.1", port=0, log_config=None, ws="none", timeout_graceful_shutdown=5
    )
    server = Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server.serve()

    api = threading.Thread(target=lambda: asyncio.run(serve()), name="api", daemon=True)
    api.start()
    with JobStore(chosen.redis_url, chosen.namespace) as jobs:
        scheduler = Scheduler(chosen, jobs, driver)
        loop = threading.Thread(target=scheduler.run, name="scheduler")
        loop.start()
        try:
            deadline = time.monotonic() + 30
            while not server.started:
                assert api.is_alive() and time.monotonic() < deadline, "the API did not start"
                time.sleep(0.02)
            port = server.servers[0].sockets[0].getsockname()[1]
            key = make_key(chosen.redis_url, chosen.namespace)
            service = RunningService(f"http://127.0.0.1:{port}", jobs, chosen, key)
            with service.http:
                yield service
        finally:
            scheduler.stop()
            loop.join()
            server.should_exit = True
            api.join(timeout=30)
            hangs = _waits(loops) if api.is_alive() else ""
            if hangs:  # end it, so that the session can, and fail
                for loop in loops:
                    for task in asyncio.all_tasks(loop):
                        loop.call_soon_threadsafe(task.cancel)
                api.join(timeout=30)
            assert not hangs, f"the API did not end by itself; it waited in {hangs}"


def _waits(loops: list[asyncio.AbstractEventLoop]) -> str:
    """Where the tasks of an event loop are."""
    text = io.StringIO()
    for loop in loops:
        for task in asyncio.all_tasks(loop):
            task.print_stack(file=text)
    return text.getvalue() or "nothing that asyncio knows of"


@pytest.fixture(scope="session")
def service(valkey_url: str, driver: Driver) -> Iterator[RunningService]:
    """The service that tests share; each uses outputs of its own."""
    with running_service(valkey_url, driver) as shared:
        yield shared
