"""A scheduler whose fleet is a thread of its own process: no Ray, but real plans, parts, uploads and commits.

What :mod:`benchmarks.load` asks is what the API and the queue bear; with merges this small, Ray's own processes would
take the two cores for themselves. Each job that is claimed is noted, in the order of the claims.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from service.cluster.driver import Capacity, Driver, TaskRequest
from service.jobs.jobstore import JobStore, Lease
from service.jobs.record import JobRecord
from service.running.scheduler import Scheduler
from service.settings import Settings
from service.watching.logs import configure
from workers.errors import MergemillError


class OneThread:
    """A :class:`~service.cluster.driver.Driver` that does one task after the other, here."""

    known_capacity = Capacity(cpus=1, gpus=0, nodes=1, max_node_memory_bytes=1 << 40)
    in_flight = 0

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)

    def submit(self, request: TaskRequest) -> Future[Any]:
        """Queue a task."""
        return self._pool.submit(_do, request)

    def cancel(self, future: Future[Any]) -> bool:
        """Give a task up."""
        return future.cancel()

    def capacity(self, timeout_s: float | None = None) -> Capacity:
        """One node."""
        return self.known_capacity


class Noting(JobStore):
    """A job store that says which jobs were claimed."""

    note: Callable[[str], object]

    def claim_next(self, *args: Any, **kwargs: Any) -> tuple[JobRecord, Lease] | None:
        """See :meth:`JobStore.claim_next`."""
        claimed = super().claim_next(*args, **kwargs)
        if claimed is not None:
            self.note(f"{claimed[0].id}\n")
        return claimed


def _do(request: TaskRequest) -> Any:
    module, _, function = request.entry.partition(":")
    ((_, value),) = getattr(import_module(module), function)([request.payload])
    if isinstance(value, MergemillError):
        raise value
    return value


def main() -> None:
    """Schedule from when the second file that is named is there until SIGTERM, noting claims in the first."""
    settings, go, stopping = Settings(), Path(sys.argv[2]), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    import_module("workers.entry")
    configure(settings.log_format)
    with (
        Path(sys.argv[1]).open("w", buffering=1) as claims,
        Noting(settings.redis_url, settings.namespace) as jobs,
    ):
        jobs.note = claims.write
        scheduler = Scheduler(settings, jobs, cast(Driver, OneThread()))
        while not go.exists() and not stopping.wait(0.05):
            pass
        signal.signal(signal.SIGTERM, lambda *_: scheduler.stop())
        if not stopping.is_set():
            scheduler.run()


if __name__ == "__main__":
    main()
