"""A few runs of ``make chaos``, with seeds of their own; in a process of its own, which adopts what is orphaned."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.chaos.places import ENDPOINT
from workers.store import StoreSettings

pytestmark = [pytest.mark.valkey, pytest.mark.ray, pytest.mark.timeout(300)]

FILES_SEED = 185
"""A scheduler and a raylet die together, another scheduler sleeps, a worker is killed, and Redis is out of reach."""
S3_SEED = 36
"""The store flips bits, resets connections and loses answers, and a Ray driver is killed; one job is cancelled."""


def run(seed: int, store: str, **environment: str) -> None:
    """One run that has to be green."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--seed", str(seed), "--store", store],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "1 of 1 runs green" in done.stdout


def test_a_run_on_files() -> None:
    run(FILES_SEED, "files")


@pytest.mark.rgw
def test_a_run_on_s3(rgw_settings: StoreSettings) -> None:
    secret = rgw_settings.s3_secret_access_key
    assert secret is not None
    server = f"{rgw_settings.s3_endpoint_url} {rgw_settings.s3_access_key_id} {secret.get_secret_value()}"
    run(S3_SEED, "s3", **{ENDPOINT: server})
