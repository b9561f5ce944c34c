"""Fixtures: a real Valkey for the session, and a job store of its own for each test. A pytest plugin."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest
import redis

from service.jobs.jobstore import JobStore
from service.valkey import EmbeddedValkey
from workers.errors import JobStoreUnavailableError


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """A server that nobody may stop."""
    try:
        server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"))
    except JobStoreUnavailableError as error:
        if os.environ.get("CI"):
            pytest.fail(f"Valkey has to run here: {error}")
        pytest.skip(str(error))
    with server:
        yield server


@pytest.fixture(scope="session")
def valkey_url(valkey_server: EmbeddedValkey) -> str:
    """Where :func:`valkey_server` listens; share it by a namespace of your own."""
    return valkey_server.url


@pytest.fixture
def valkey_namespace() -> str:
    """A namespace that nobody else uses."""
    return f"test-{uuid.uuid4().hex}"


@pytest.fixture
def job_store(valkey_url: str, valkey_namespace: str) -> Iterator[JobStore]:
    """An empty job store."""
    with JobStore(valkey_url, valkey_namespace) as store:
        yield store


@pytest.fixture
def raw(valkey_url: str) -> Iterator[redis.Redis]:
    """A bare connection, to look behind the job store's back."""
    with redis.Redis.from_url(valkey_url, decode_responses=True) as client:
        yield client
