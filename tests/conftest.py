"""Servers that tests share, and what is true of every test."""

from __future__ import annotations

import pytest
import torch

pytest_plugins = [
    "tests.log_lines",
    "tests.servers.ray_fixtures",
    "tests.servers.rgw_fixtures",
    "tests.servers.service",
    "tests.servers.valkey",
]

torch.set_num_threads(1)  # the machine is shared with Ray's workers; results do not depend on it


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run in several processes, each file stays in one, and all that need a Ceph gateway share one."""
    gateways = {item.path for item in items if "rgw" in getattr(item, "fixturenames", ())}
    for item in items:
        item.add_marker(
            pytest.mark.xdist_group("rgw" if item.path in gateways else item.nodeid.partition("::")[0])
        )
