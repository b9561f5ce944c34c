"""Servers that tests share, and what is true of every test."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).parents[1]

pytest_plugins = [
    "tests.log_lines",
    "tests.servers.ray_fixtures",
    "tests.servers.rgw_fixtures",
    "tests.servers.service",
    "tests.servers.valkey",
]

torch.set_num_threads(1)  # the machine is shared with Ray's workers; results do not depend on it


class OneGateway(LoadFileScheduling):
    """Where tests run in several processes: each file in one, and all that need a Ceph gateway share one."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "Ceph" if _needs_gateway(file) else file


@cache
def _needs_gateway(file: str) -> bool:
    return "pytest.mark.rgw" in (ROOT / file).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> OneGateway:
    """Which process runs which test."""
    return OneGateway(config, log)
