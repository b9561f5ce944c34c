"""The API alone, on a port: with a Valkey behind it, and with none."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from api.app import create_app
from api.server import Server
from service.jobs import jobstore
from service.settings import Settings
from tests.servers.keys import bearer, make_key


@contextmanager
def serving(app: FastAPI) -> Iterator[httpx.Client]:
    """A client of the application on a real server."""
    server = Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the API did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def api(valkey_url: str, valkey_namespace: str) -> Iterator[httpx.Client]:
    """An API with job state of its own."""
    with serving(create_app(Settings(redis_url=valkey_url, namespace=valkey_namespace))) as client:
        client.headers.update(bearer(make_key(valkey_url, valkey_namespace)))
        yield client


@pytest.fixture(scope="module")
def lonely_api() -> Iterator[httpx.Client]:
    """An API whose Redis is not there, and that soon gives up looking for it; for a key it cannot look either."""
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as probe:
        patch.setattr(jobstore, "CONNECTION_TRIES", 0)
        url = f"redis://127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        with serving(create_app(Settings(redis_url=url, auth="off"))) as client:
            yield client
