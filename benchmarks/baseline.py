"""What a worker holds before its first byte: called in a Ray worker by :mod:`benchmarks.memory`.

It imports nothing itself, so that each step is seen alone.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

Stage = tuple[str, int, float, float]
"""What was done, VmHWM then in bytes, and the CPU and wall seconds that it took."""


def stages(_: None) -> list[Stage]:
    """Become a worker that can do anything, step by step."""
    found = [("Ray", _peak_bytes(), 0.0, 0.0)]
    steps: dict[str, Callable[[], Any]] = {
        "torch": partial(importlib.import_module, "torch"),
        "boto3": partial(importlib.import_module, "boto3"),
        "workers.entry": partial(importlib.import_module, "workers.entry"),
        "numba": partial(importlib.import_module, "workers.kernels.cpu"),
        "kernels": lambda: importlib.import_module("workers.kernels.cpu").prepare(),
        "S3 client": _s3_client,
    }
    for name, step in steps.items():
        cpu, wall = time.process_time(), time.perf_counter()
        step()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        found.append((name, _peak_bytes(), cpu, wall))
    return found


def _s3_client() -> object:
    settings = importlib.import_module("workers.store.settings").StoreSettings
    nobody = {"s3_access_key_id": "nobody", "s3_secret_access_key": "nothing"}
    connection = importlib.import_module("workers.store.s3_client").S3Connection(
        settings(s3_endpoint_url="http://127.0.0.1:9", **nobody)
    )
    return connection.client


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
