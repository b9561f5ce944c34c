"""A scheduler's sign of life: written by a thread of its own, whatever its jobs wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Final, Self

import structlog

from service.settings import Settings
from service.watching.deployment import Deployment, Heartbeat
from service.watching.metrics import Fleet
from workers.errors import JobStoreUnavailableError

BEATS_PER_LIFE: Final = 4
"""How often a heartbeat is renewed before it would run out: three that are lost do no harm."""

log = structlog.get_logger(__name__)


class Heart:
    """Says that a scheduler is alive, from the beginning to the end of the ``with`` block.

    A heartbeat lasts as long as a lease: who has been silent for that long has lost its jobs, too.
    """

    def __init__(self, settings: Settings, owner: str, fleet: Fleet, jobs: Callable[[], int]) -> None:
        """
        :param jobs: how many jobs it runs.
        """
        self._deployment = Deployment(settings.redis_url, settings.namespace)
        self._owner = owner
        self._ttl_s = settings.lease_seconds
        self._fleet = fleet
        self._jobs = jobs
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping.set()
        self._thread.join()
        self._deployment.close()

    def _run(self) -> None:
        while True:
            self._try(
                lambda: self._deployment.beat(self._now()), "could not say that this scheduler is alive"
            )
            if self._stopping.wait(self._ttl_s / BEATS_PER_LIFE):
                break
        self._try(lambda: self._deployment.leave(self._owner), "could not say that this scheduler ends")

    def _now(self) -> Heartbeat:
        capacity = self._fleet.known_capacity
        return Heartbeat(
            owner=self._owner,
            version=version("mergemill"),
            nodes=capacity.nodes if capacity else 0,
            cpus=capacity.cpus if capacity else 0,
            gpus=capacity.gpus if capacity else 0,
            jobs=self._jobs(),
            ttl_s=self._ttl_s,
        )

    @staticmethod
    def _try(action: Callable[[], None], failure: str) -> None:
        try:
            action()
        except JobStoreUnavailableError as error:
            log.warning(failure, error=str(error))
