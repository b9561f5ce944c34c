"""Fixtures: a driver on a local Ray for the session, and Ray clusters of several nodes. A pytest plugin."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from service.cluster.driver import Driver
from service.cluster.fleet_process import FleetSettings
from tests.servers.ray_cluster import RayCluster
from workers.errors import FleetError


def unusable(reason: object) -> None:
    """Ray does not run here: skip, but not where everything has to run."""
    if os.environ.get("CI"):
        pytest.fail(f"Ray has to run here: {reason}")
    pytest.skip(f"Ray does not run here: {reason}")


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    """A driver on a local Ray with two CPUs. Tests may kill what is below it, and leave nothing queued."""
    with Driver(FleetSettings(address="local", num_cpus=2)) as shared:
        try:
            shared.capacity(timeout_s=100)
        except FleetError as error:
            unusable(error)
        yield shared


@pytest.fixture
def ray_cluster() -> Iterator[RayCluster]:
    """Three nodes with one CPU and 1 GiB for tasks each."""
    try:
        cluster = RayCluster(nodes=3)
    except RuntimeError as error:
        unusable(error)
    with cluster:
        yield cluster
