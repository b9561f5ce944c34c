"""A scheduler in a process of its own, which holds each job at a step of its own and then stops, as by SIGSTOP.

The step of a job is the n-th time that its runner renews the lease, which is right before every change: what the
job does next, when the process goes on, comes too late. The parent writes one line, of JSON, to standard input.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections import Counter
from concurrent.futures import Future
from typing import Any

from service.cluster.driver import TaskRequest
from service.jobs.jobstore import JobStore, Lease
from service.running.scheduler import Scheduler
from service.settings import Settings
from service.watching.logs import configure
from tests.e2e.bench import LocalDriver


class Holding(JobStore):
    """A job store that does not come back from some renewals before the process has been stopped and goes on."""

    def __init__(self, url: str, namespace: str, steps: dict[str, int]) -> None:
        super().__init__(url, namespace)
        self._steps = steps
        self._seen: Counter[str] = Counter()
        self._held: set[str] = set()
        self._woken = threading.Event()
        self._lock = threading.Lock()
        signal.signal(signal.SIGCONT, lambda *_: self._woken.set())

    def renew(self, lease: Lease) -> None:
        """Renew the lease; what renews it before a change waits after its step."""
        super().renew(lease)
        if threading.current_thread().name == "leases" or lease.job not in self._steps:
            return
        with self._lock:
            self._seen[lease.job] += 1
            if self._seen[lease.job] != self._steps[lease.job]:
                return
            self._held.add(lease.job)
            all_held = len(self._held) == len(self._steps)
        if all_held:
            os.kill(os.getpid(), signal.SIGSTOP)
        self._woken.wait()


class OneByOne(LocalDriver):
    """A driver for several jobs at once."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()

    def submit(self, request: TaskRequest) -> Future[Any]:
        """Run a task."""
        with self._lock:
            return super().submit(request)


def _nothing(fd: object) -> None:
    """Sync nothing."""


def main() -> None:
    """Run until SIGTERM."""
    os.fsync = os.fdatasync = _nothing  # as in the fixture `bench`
    configure("json")
    given = json.loads(sys.stdin.readline())
    settings = Settings.model_validate(given["settings"])
    with Holding(settings.redis_url, settings.namespace, given["steps"]) as jobs:
        scheduler = Scheduler(settings, jobs, OneByOne())  # type: ignore[arg-type] # all of it that it uses
        signal.signal(signal.SIGTERM, lambda *_: scheduler.stop())
        scheduler.run()


if __name__ == "__main__":
    main()
