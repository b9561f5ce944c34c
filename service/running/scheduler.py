"""Claims jobs under leases and runs each in a thread. Any number of schedulers may run."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType

import structlog
from pydantic import ValidationError

from service.cluster.driver import Driver
from service.cluster.fleet_process import FleetSettings
from service.jobs.jobstore import JobStore
from service.jobs.leases import Lease
from service.running.runner import JobRunner
from service.running.sweeper import Sweeper
from service.running.work import Tools
from service.settings import Settings
from service.watching import metrics
from service.watching.heartbeat import Heart
from service.watching.metrics_server import MetricsServer
from service.webhooks.courier import Courier
from service.webhooks.store import WebhookStore
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
        # By lease: who has lost one may take the job again before the one who held it has noticed.
        self._running: dict[Lease, tuple[JobRunner, threading.Thread]] = {}
        # Says that there may be work before the next look; a signal handler may say so, whatever it interrupts.
        self._roused: SimpleQueue[None] = SimpleQueue()
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
                    self._pause()
        for _, thread in self._snapshot():
            thread.join()
        keeper.join()
        log.info("scheduler stopped", owner=self.owner)

    def stop(self) -> None:
        """Let go of every job, which others or a later start take over. Safe in a signal handler."""
        self._stopping.set()
        self._roused.put(None)

    def _pause(self) -> None:
        """Until it is time to look for work again, or a job has ended, or this scheduler is stopped."""
        settings = self._settings
        with suppress(Empty):
            self._roused.get(
                timeout=settings.busy_poll_seconds if self._snapshot() else settings.poll_seconds
            )

    def _run_job(self, runner: JobRunner) -> None:
        try:
            runner.run()
        finally:
            with self._lock:
                del self._running[runner.lease]
                self._next_look = 0.0
            self._roused.put(None)

    def _claim(self) -> bool:
        """Take one more job if there is room and work."""
        now = time.monotonic()
        with self._lock:
            running = len(self._running)
            if running >= self._settings.max_running_jobs or (running and now < self._next_look):
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
            with self._lock:
                if len(self._running) == running:  # since one ended, another may be due
                    self._next_look = now + self._settings.busy_poll_seconds
            return False
        record, lease = claimed
        runner = JobRunner(record, lease, self._tools)
        thread = threading.Thread(target=self._run_job, args=(runner,), name=record.id, daemon=True)
        with self._lock:
            self._running[lease] = (runner, thread)
        thread.start()
        return True

    def _keep_leases(self) -> None:
        """Renew every lease in time; a runner whose lease is lost is told, and stops."""
        while not self._stopping.wait(self._settings.lease_seconds / RENEWALS_PER_LEASE) or self._snapshot():
            for runner, _ in self._snapshot():
                try:
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
            return list(self._running.values())


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
