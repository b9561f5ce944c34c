"""The service against its own OpenAPI document, as schemathesis tries it: no answer is a 5xx, none is undocumented."""

from __future__ import annotations

import os
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.app import create_app
from service.settings import Settings
from tests.api.conftest import serving
from tests.fuzzing import FACTOR
from tests.servers.keys import bearer, make_key
from workers.store import StoreSettings

pytestmark = [pytest.mark.valkey, pytest.mark.fuzz]

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
SCHEMA = schemathesis.openapi.from_dict(create_app(Settings()).openapi())
OPERATIONS = [(path, method) for path, item in SCHEMA.raw_schema["paths"].items() for method in item]


@pytest.fixture(scope="module")
def api(valkey_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service that may use one empty directory, and no S3."""
    place = tmp_path_factory.mktemp("only")
    store = StoreSettings(file_roots=(str(place),), s3_endpoint_url="http://127.0.0.1:1", s3_max_attempts=1)
    namespace = f"test-{place.name}-{os.getpid()}"
    with serving(create_app(Settings(redis_url=valkey_url, namespace=namespace, store=store))) as client:
        client.headers.update(bearer(make_key(valkey_url, namespace)))
        yield client


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_operation(api: httpx.Client, path: str, method: str) -> None:
    operation = SCHEMA[path][method]
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))

    @settings(max_examples=20 * FACTOR, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def tried(case: schemathesis.Case) -> None:
        key = {"Authorization": api.headers["Authorization"]}
        case.call_and_validate(base_url=str(api.base_url), headers=key, checks=CHECKS)

    tried()
