"""The S3 store against moto: the contract without a real server, in any environment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.moto import running_moto
from tests.servers.rgw_fixtures import make_bucket
from tests.workers.store.contract import StoreContract
from workers.store import StoreSettings
from workers.store.s3 import S3Store


@pytest.fixture(scope="module")
def settings() -> Iterator[StoreSettings]:
    # moto answers 500 now and then when two versions of a part come at once
    with running_moto(s3_max_attempts=10) as settings:
        yield settings


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
    writers_of_a_part = 1  # two versions of a part at once are too much for moto: it may lose another part
