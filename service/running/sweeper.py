"""Clears away what is over: records of old jobs, and what crashes, stalls and lost answers left at outputs.

Any number of schedulers may run; one of them sweeps. What belongs to a job that goes on is not touched: an output is
looked at under the lease of a job that has ended there, with the output claimed for it, as if that job ended anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Final, Self

import structlog

from service.access import confine
from service.jobs.jobstore import JobStore
from service.jobs.leases import Lease, permit
from service.jobs.sweepstore import SweepStore
from service.running.commit import Output
from service.running.interruptible import Interruptible
from service.running.retention import Retention
from service.settings import Settings
from service.watching import metrics
from workers.errors import (
    DamagedClaimError,
    ForbiddenError,
    JobNotFoundError,
    JobStoreUnavailableError,
    LeaseLostError,
    OutputConflictError,
    StoreError,
    StoreUnavailableError,
)
from workers.store.base import ObjectStore

LEAD_S: Final = 60.0
"""How long a sweeper that is not heard of keeps others from sweeping, and its jobs' outputs from others, in seconds."""

STALL_S: Final = 30.0
"""Longest wait for one answer of the store, in seconds."""

log = structlog.get_logger(__name__)


class Sweeper:
    """Sweeps now and then until it is closed; a context manager."""

    def __init__(self, settings: Settings, jobs: JobStore, store: ObjectStore, owner: str) -> None:
        """
        :param owner: whose it is, for others and for people.
        """
        self._sweeps = SweepStore(settings.redis_url, settings.namespace)
        self._jobs = jobs
        self._store = Interruptible(store, self._look).store
        self._owner = owner
        self._pause_s = settings.sweep_seconds
        self._retention = Retention(settings.retention_seconds, settings.abandoned_seconds)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._sweeps.close()

    def _run(self) -> None:
        while not self._stopping.wait(self._pause_s):
            try:
                self.sweep()
            except JobStoreUnavailableError as error:
                log.warning("job state is out of reach; nothing is swept", error=str(error))
            except Exception:  # a defect of ours: jobs go on, and it is tried again
                log.exception("sweeping failed")
        try:
            self._sweeps.retire(self._owner)
        except JobStoreUnavailableError as error:
            log.warning("could not give up sweeping; it will expire", error=str(error))

    def sweep(self) -> bool:
        """Sweep once, if nobody else does; whether this did."""
        if not self._leads():
            return False
        self._sweeps.enrol()
        now = self._sweeps.now()
        self._each(lambda: self._sweeps.unswept(self._retention.sweep_before(now)), self._sweep_output)
        before = self._retention.forget_before(now)
        if before is not None:
            self._each(lambda: self._sweeps.ended(before), lambda job: self._forget(job, before))
        return True

    def _each(self, page: Callable[[], tuple[str, ...]], act: Callable[[str], None]) -> None:
        """Do something with every job of every page, each once, for as long as this is the sweeper."""
        seen: set[str] = set()
        while fresh := [job for job in page() if job not in seen]:
            for job in fresh:
                if self._stopping.is_set() or not self._leads():
                    return
                act(job)
            seen.update(fresh)

    def _leads(self) -> bool:
        return self._sweeps.lead(self._owner, LEAD_S)

    def _look(self, waited_s: float) -> None:
        if waited_s > STALL_S or (waited_s and self._stopping.is_set()):
            raise StoreUnavailableError(f"the store has not answered for {waited_s:.0f} seconds")

    def _forget(self, job: str, before: float) -> None:
        if self._sweeps.forget_old(job, before):
            metrics.SWEPT.labels("record").inc()
            log.info("an old job is forgotten", job=job)

    def _sweep_output(self, job: str) -> None:
        """Look at the output of a job that has ended; later, when it is in use or out of reach."""
        try:
            lease = self._jobs.acquire(job, self._owner, LEAD_S)
        except JobNotFoundError:
            self._sweeps.swept(job)
            return
        if lease is None:  # whoever ended it is at it still
            self._postpone(job)
            return
        try:
            self._clear(job, lease)
            self._sweeps.swept(job)
        except LeaseLostError as error:
            log.warning("lease lost while an output was swept", job=job, reason=str(error))
        except OutputConflictError:  # its owner clears it in the end
            self._postpone(job)
        except (StoreError, ForbiddenError, DamagedClaimError) as error:
            log.warning("an output could not be swept; trying again later", job=job, error=str(error))
            self._postpone(job)
        finally:
            self._jobs.release(lease)

    def _clear(self, job: str, lease: Lease) -> None:
        record = self._jobs.get(job)
        if not record.attempt:  # it never came to look at its output
            return
        self._jobs.claim_output(lease, record.output)
        now, left_since = self._sweeps.now(), record.created_at if self._sweeps.left(job) else None
        store = confine(self._store, record.access, record.output)
        output = Output(store, record.output, job, partial(permit, self._jobs, lease))
        removed = output.sweep(lambda name, at: self._retention.is_abandoned(name, at, now, left_since))
        self._jobs.release_output(lease, record.output)
        if removed:
            metrics.SWEPT.labels("output").inc(removed)
            log.info("an output was swept", job=job, output=record.output, removed=removed)

    def _postpone(self, job: str) -> None:
        """Back off: as long as a tenth of the time since it ended."""
        now = self._sweeps.now()
        try:
            ended = self._jobs.get(job).updated_at
        except JobNotFoundError:
            return
        pause = self._retention.pause_s(ended, now)
        self._sweeps.postpone(job, self._retention.sweep_before(now) + pause)
