"""Fixtures around a real Ceph gateway; a plugin module, named in ``tests/conftest.py``."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import NoReturn

import boto3
import pytest

from tests.servers.rgw import INSTALL_HINT, RGW, missing_binaries, start_rgw
from workers.store import StoreSettings


def give_up(missing: list[str]) -> NoReturn:
    """Skip the test, or fail it in CI, with the line that installs what is missing."""
    reason = f"Ceph RGW tests need {', '.join(missing)}: {INSTALL_HINT}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def rgw() -> Iterator[RGW]:
    """One gateway for the session; skipped where Ceph is not installed, but a failure in CI."""
    if missing := missing_binaries():
        give_up(missing)
    with start_rgw() as gateway:
        yield gateway


@pytest.fixture(scope="session")
def rgw_settings(rgw: RGW) -> StoreSettings:
    """How to reach it. ``when_required``: Ceph 16 ignores CRC32 checksums but verifies Content-MD5."""
    return StoreSettings(
        s3_endpoint_url=rgw.endpoint_url,
        s3_region="us-east-1",
        s3_access_key_id=rgw.access_key,
        s3_secret_access_key=rgw.secret_key,
        s3_addressing_style="path",
        s3_checksums="when_required",
    )


@pytest.fixture
def rgw_bucket(rgw_settings: StoreSettings) -> str:
    """``s3://`` URI of a new, empty bucket."""
    return make_bucket(rgw_settings)


def make_bucket(settings: StoreSettings) -> str:
    """``s3://`` URI of a new, empty bucket."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    secret = settings.s3_secret_access_key
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
    )
    try:
        client.create_bucket(Bucket=bucket)
    finally:
        client.close()
    return f"s3://{bucket}"
