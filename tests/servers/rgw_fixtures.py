"""Fixtures around a real Ceph gateway; a plugin module, named in ``tests/conftest.py``."""

from __future__ import annotations

import os
import secrets
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import boto3
import pytest
from pydantic import SecretStr

from tests.servers.rgw import INSTALL_HINT, RGW, missing_binaries, start_rgw
from workers.store import StoreSettings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


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


@pytest.fixture(scope="session")
def rgw_stranger(rgw: RGW, rgw_settings: StoreSettings) -> StoreSettings:
    """How another user reaches it, whose buckets ours may not touch until he lets him."""
    access_key, secret_key = secrets.token_hex(10).upper(), secrets.token_hex(20)
    subprocess.run(
        [
            "radosgw-admin", "-c", str(rgw.directory / "ceph.conf"), "user", "create", "--uid=stranger",
            "--display-name=Stranger", f"--access-key={access_key}", f"--secret-key={secret_key}",
        ],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    keys = {"s3_access_key_id": access_key, "s3_secret_access_key": SecretStr(secret_key)}
    return rgw_settings.model_copy(update=keys)


@pytest.fixture
def rgw_bucket(rgw_settings: StoreSettings) -> str:
    """``s3://`` URI of a new, empty bucket."""
    return make_bucket(rgw_settings)


def make_bucket(settings: StoreSettings) -> str:
    """``s3://`` URI of a new, empty bucket."""
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    with client_of(settings) as client:
        client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@contextmanager
def client_of(settings: StoreSettings) -> Iterator[S3Client]:
    """A client for what the store never does, such as making buckets."""
    secret = settings.s3_secret_access_key
    client = boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
    )
    try:
        yield client
    finally:
        client.close()
