"""Servers that tests share, and what is true of every test."""

from __future__ import annotations

import torch

pytest_plugins = [
    "tests.log_lines",
    "tests.servers.ray_fixtures",
    "tests.servers.rgw_fixtures",
    "tests.servers.service",
    "tests.servers.valkey",
]

torch.set_num_threads(1)  # the machine is shared with Ray's workers; results do not depend on it
