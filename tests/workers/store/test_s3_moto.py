"""The S3 store against moto: the contract without a real server, in any environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

from tests.servers.rgw_fixtures import make_bucket
from tests.workers.store.contract import StoreContract
from workers.store import StoreSettings
from workers.store.s3 import S3Store


@pytest.fixture(scope="module")
def settings() -> Iterator[StoreSettings]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield StoreSettings(
            s3_endpoint_url=f"http://{host}:{port}",
            s3_region="us-east-1",
            s3_access_key_id="test",
            s3_secret_access_key="test",
            s3_addressing_style="path",
            s3_max_attempts=10,  # moto answers 500 now and then when two versions of a part come at once
            s3_retry_wait_s=0.01,
        )
    finally:
        server.stop()


@pytest.fixture(scope="module")
def store(settings: StoreSettings) -> Iterator[S3Store]:
    store = S3Store(settings)
    yield store
    store.close()


@pytest.fixture
def root(settings: StoreSettings) -> str:
    return make_bucket(settings)


class TestS3StoreOnMoto(StoreContract):
    """moto verifies no checksum and ignores the copy's pin; both are made good by the store."""

    tells_when = False
