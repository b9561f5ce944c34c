"""Claims jobs under leases and runs each in a thread. Any number of schedulers may run."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import structlog
from pydantic import ValidationError

from service import metrics
from service.courier import Courier
from service.driver import Driver
from service.fleet_process import FleetSettings
from service.heartbeat import Heart
from service.jobstore import JobStore
from service.metrics_server import MetricsServer
from service.runner import JobRunner
from service.settings import Settings
from service.sweeper import Sweeper
from service.webhookstore import WebhookStore
from service.work import Tools
from workers import tracing
from workers.errors import FleetError, JobStoreUnavailableError, LeaseLostError
from workers.store import open_stores
from workers.store.base import ObjectStore

log = structlog.get_logger(__name__)

RENEWALS_PER_LEASE = 4
"""How often a lease is renewed before it would run out: three lost renewals do no harm."""


class Scheduler:
    """Runs up to ``max_running_jobs`` jobs at once until :meth:`stop`."""

    def __init__(self, settings: Settings, jobs: JobStore, driver: Driver) -> None:
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._stopping = threading.Event()
        self._settings = settings
        self._jobs = jobs
        self._tools = Tools(settings, jobs, open_stores(settings.store), driver, self._stopping)
        self._running: dict[str, tuple[JobRunner, threading.Thread]] = {}
        self._next_look = 0.0
        self._lock = threading.Lock()

    @property
    def store(self) -> ObjectStore:
        """Object storage, as its jobs see it."""
        return self._tools.store

    def run(self) -> None:
        """Claim and run jobs; returns after :meth:`stop`, when every job has been let go of."""
        log.info("scheduler started", owner=self.owner)
        keeper = threading.Thread(target=self._keep_leases, name="leases", daemon=True)
        keeper.start()
        with Heart(self._settings, self.owner, self._tools.driver, lambda: len(self._snapshot())):
            while not self._stopping.is_set():
                if not self._claim():
                    self._stopping.wait(self._settings.poll_seconds)
        for _, thread in self._snapshot():
            thread.join()
        keeper.join()
        log.info("scheduler stopped", owner=self.owner)

    def stop(self) -> None:
        """Let go of every job, which others or a later start take over. Safe in a signal handler."""
        self._stopping.set()

    def _claim(self) -> bool:
        """Take one more job if there is room and work."""
        now = time.monotonic()
        with self._lock:
            before = len(self._running)
            self._running = {job: pair for job, pair in self._running.items() if pair[1].is_alive()}
            if len(self._running) >= self._settings.max_running_jobs:
                return False
            if len(self._running) == before > 0 and now < self._next_look:
                return False
        try:
            settings = self._settings
            most = (settings.max_running_jobs_total, settings.limits.running_jobs)
            claimed = self._jobs.claim_next(self.owner, settings.lease_seconds, *most)
        except JobStoreUnavailableError as error:
            log.warning("job state is out of reach", error=str(error))
            return False
        except ValidationError as error:
            # Written by another version of Mergemill; the lease just taken keeps it out of the way for a while.
            log.error("a job's record cannot be read; it is left alone", error=str(error))
            return False
        if claimed is None:
            self._next_look = now + self._settings.busy_poll_seconds
            return False
        record, lease = claimed
        runner = JobRunner(record, lease, self._tools)
        thread = threading.Thread(target=runner.run, name=record.id, daemon=True)
        with self._lock:
            self._running[record.id] = (runner, thread)
        thread.start()
        return True

    def _keep_leases(self) -> None:
        """Renew every lease in time; a runner whose lease is lost is told, and stops."""
        while not self._stopping.wait(self._settings.lease_seconds / RENEWALS_PER_LEASE) or self._snapshot():
            for runner, thread in self._snapshot():
                try:
                    if thread.is_alive():
                        self._jobs.renew(runner.lease)
                except LeaseLostError:
                    runner.lost.set()
                except JobStoreUnavailableError as error:
                    log.warning("could not renew a lease", job=runner.lease.job, error=str(error))
            if self._stopping.is_set():
                for _, thread in self._snapshot():
                    thread.join(self._settings.lease_seconds / RENEWALS_PER_LEASE)

    def _snapshot(self) -> list[tuple[JobRunner, threading.Thread]]:
        with self._lock:
            return [pair for pair in self._running.values() if pair[1].is_alive()]


def main(settings: Settings, ready_file: Path | None = None) -> None:
    """Run a scheduler with its Ray driver until SIGTERM or SIGINT.

    :param ready_file: made when the compute is there and jobs are being claimed, and removed at the end.
    :raises FleetError: Ray cannot be reached or started.
    """
    fleet = FleetSettings(
        address=settings.ray_address,
        num_cpus=settings.ray_cpus,
        state_dir=settings.state_dir.expanduser(),
    )
    tracing.configure("scheduler")
    token = settings.metrics_token
    with (
        JobStore(settings.redis_url, settings.namespace) as jobs,
        WebhookStore(settings.redis_url, settings.namespace) as webhooks,
        Driver(fleet) as driver,
        Courier(webhooks, settings),
        MetricsServer(
            settings.metrics_host,
            settings.metrics_port,
            token.get_secret_value() if token else None,
            metrics.SCHEDULER,
            metrics.FleetCollector(driver),
        ),
        ExitStack() as sweeping,
    ):
        scheduler = Scheduler(settings, jobs, driver)
        sweeping.enter_context(Sweeper(settings, jobs, scheduler.store, scheduler.owner))

        def stop(signum: int, _: FrameType | None) -> None:
            log.info("stopping", signal=signal.Signals(signum).name)
            scheduler.stop()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        for warning in jobs.durability_warnings():
            log.warning("Redis may lose acknowledged jobs", reason=warning)
        try:
            capacity = driver.capacity()
        except FleetError:
            log.exception("no compute")
            raise
        log.info("compute ready", nodes=capacity.nodes, cpus=capacity.cpus, gpus=capacity.gpus)
        if ready_file is not None:
            ready_file.touch()
        try:
            scheduler.run()
        finally:
            if ready_file is not None:
                ready_file.unlink(missing_ok=True)
