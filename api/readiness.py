"""What the service depends on, and whether it is there: Redis, the object store, schedulers with compute.

The API can do its part without compute: jobs are accepted, told about and cancelled, and wait. So no scheduler is
a check that fails and a warning, and not 503; that would take the API away from everybody while one is started.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import structlog

from api.schemas import Check
from service.watching.deployment import Deployment, View
from workers.errors import JobStoreUnavailableError, MergemillError, ObjectNotFoundError
from workers.store.base import ObjectStore
from workers.store.uris import normalise, scheme, to_path

REQUIRED: Final = ("redis", "store")
"""The checks without which the API is not ready."""

FRESH_S: Final = 15.0
"""How long an answer of the store is good for, in seconds: load balancers ask more often than it need be asked."""

PATIENCE_S: Final = 2.0
"""Longest wait for the store within a request, in seconds."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Probed:
    at: float
    problem: str


class StoreProbe:
    """Asks the object store for the model roots now and then, in a thread of its own; a context manager.

    A store that does not answer holds up no request for long, and nobody is told where models are.
    """

    def __init__(
        self,
        store: ObjectStore,
        roots: Mapping[str, str],
        *,
        fresh_s: float = FRESH_S,
        patience_s: float = PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._roots = tuple(dict.fromkeys(roots.values()))
        self._fresh_s = fresh_s
        self._patience_s = patience_s
        self._clock = clock
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="store-probe")
        self._asked_at = 0.0
        self._asking: Future[None] | None = None
        self._last: _Probed | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def check(self) -> Check:
        """What the store said last, asked again when that is too long ago."""
        if not self._roots:
            return Check(state="unused", detail="no model roots are set, so there is nothing to ask for")
        with self._lock:
            if self._asking is None and (
                self._last is None or self._clock() - self._last.at >= self._fresh_s
            ):
                self._asked_at = self._clock()
                self._asking = self._pool.submit(self._ask)
            asking = self._asking
        if asking is not None:
            wait((asking,), self._patience_s)
        with self._lock:
            last, now = self._last, self._clock()
            late = self._asking is not None and now - self._asked_at >= self._patience_s
            if late and (last is None or now - last.at >= 2 * self._fresh_s):
                return Check(state="missing", detail=f"no answer for {now - self._asked_at:.0f} s")
            if last is None:
                return Check(state="unknown", detail="no answer yet")
            return Check(
                state="missing" if last.problem else "ok",
                age_seconds=round(max(0.0, now - last.at), 3),
                detail=last.problem or None,
            )

    def _ask(self) -> None:
        problems = [problem for root in self._roots if (problem := self._problem(root))]
        found = "; ".join(dict.fromkeys(problems))
        with self._lock:
            self._last = _Probed(self._clock(), f"{len(problems)} model root(s): {found}" if found else "")
            self._asking = None

    def _problem(self, root: str) -> str:
        """What is wrong with a root, without its name."""
        try:
            uri = normalise(root)
            if scheme(uri) == "file":
                return "" if Path(to_path(uri)).is_dir() else "no such directory"
            next(iter(self._store.list(f"{uri}/", beside=True)), None)
        except ObjectNotFoundError:
            problem = "no such bucket"
        except (MergemillError, OSError, ValueError) as error:
            problem = type(error).__name__
            log.warning("a model root is out of reach", root=root, error=str(error))
        else:
            problem = ""
        return problem


def look(deployment: Deployment, probe: StoreProbe) -> dict[str, Check]:
    """Every check, by the name of what it is about."""
    try:
        view = deployment.look()
    except JobStoreUnavailableError as error:
        redis = Check(state="missing", detail=str(error))
        compute = Check(state="unknown", detail="only Redis knows")
    else:
        redis, compute = Check(state="ok", age_seconds=0.0), compute_check(view)
    return {"redis": redis, "store": probe.check(), "compute": compute}


def compute_check(view: View) -> Check:
    """Whether jobs that are accepted will be run."""
    if not view.schedulers:
        return Check(state="missing", detail="no scheduler is alive: jobs wait until one is")
    best = max(view.schedulers, key=lambda scheduler: (scheduler.beat.cpus, -scheduler.age_s))
    beat, count = best.beat, len(view.schedulers)
    detail = f"{count} scheduler(s); {beat.nodes} node(s), {beat.cpus:g} CPUs, {beat.gpus:g} GPUs"
    age_s = round(best.age_s, 3)
    if not beat.cpus:
        return Check(state="missing", age_seconds=age_s, detail=f"no compute cluster is up: {detail}")
    return Check(state="ok", age_seconds=age_s, detail=detail)


def missing(checks: Mapping[str, Check]) -> dict[str, str]:
    """What keeps the API from being ready, and why."""
    return {name: checks[name].detail or "" for name in REQUIRED if checks[name].state == "missing"}
