"""Several Ray nodes on this machine, some of which can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parent.parent.parent
"""The project, which the nodes' workers import."""

ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    # A dead node is noticed in 3 s; Ray's own 15 s and more are a long time for a test.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_health_check_initial_delay_ms": "2000",
}


class RayCluster:
    """Several Ray nodes on this machine, in a process tree of their own. A context manager.

    The first node is the head, which a driver connects through and which cannot be killed.
    """

    def __init__(self, *, nodes: int, cpus: int = 1, memory_bytes: int = 1 << 30) -> None:
        warden = [sys.executable, "-m", "service.cluster.warden", str(os.getpid()), "--"]
        cluster = [sys.executable, "-m", "tests.servers.ray_nodes", str(nodes), str(cpus), str(memory_bytes)]
        self._process = subprocess.Popen(
            [*warden, *cluster],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT},
        )
        self.address = self._answer()
        """What a driver connects to."""
        self.raylets = [int(pid) for pid in self._answer().split()]
        """Process ids of the nodes' raylets, the parents of their workers; the head's first."""

    def kill_node(self, raylet: int) -> None:
        """Kill a node, with all that runs on it, as a machine dies."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{raylet}\n")
        self._process.stdin.flush()
        assert self._answer() == "removed"
        self.raylets.remove(raylet)

    def close(self) -> None:
        """End all nodes."""
        self._process.terminate()
        self._process.communicate(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        raise RuntimeError("the cluster's process ended")
