"""What is done to a stack: each kind of strike, and its end where it lasts."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from service.jobs.record import JobRecord
from tests.chaos.credentials import Credentials
from tests.chaos.disk import Disk
from tests.chaos.fault_proxy import FaultProxy
from tests.chaos.faults import Fault, Policy, Request, Storm
from tests.chaos.faults import Kind as StoreFault
from tests.chaos.holding import resume, wait
from tests.chaos.known import OfKnown
from tests.chaos.places import Place
from tests.chaos.plan import AT_SCHEDULER, ON_STORE, Kind, Strike
from tests.chaos.processes import Life, below
from tests.chaos.stack import SCHEDULERS, Stack
from workers.errors import JobStoreUnavailableError
from workers.store import join
from workers.store.base import Upload

STORMS = {
    Kind.STORE_ERRORS: {StoreFault.INTERNAL_ERROR: 0.2, StoreFault.SLOW_DOWN: 0.2},
    Kind.STORE_RESETS: {StoreFault.RESET: 0.2, StoreFault.CUT_REQUEST: 0.2},
    Kind.STORE_TRUNCATED: {StoreFault.TRUNCATE: 0.4},
    Kind.STORE_FLIPS: {StoreFault.FLIP_REQUEST: 0.4},
    Kind.STORE_READ_FLIPS: {StoreFault.FLIP: 0.4},
    Kind.STORE_LOST_ANSWERS: {StoreFault.LOSE_ANSWER: 0.3},
    Kind.STORE_SLOW: {StoreFault.STALL: 0.2, StoreFault.DELAY: 0.4},
}
"""How often what happens to a request while the store is struck."""

COMMIT_WITHIN_S = 30.0
"""How long a commit is waited for that somebody is to be stopped in."""
IDLE_S = 3.0
"""But no longer than this after the last job has ended: longer than any pause between two that are submitted."""


@dataclass
class Weather:
    """All storms that rage at once; the first that strikes a request is the one that it meets."""

    storms: list[Policy] = field(default_factory=list)

    def decide(self, request: Request) -> Fault | None:
        """See :meth:`tests.chaos.faults.Policy.decide`."""
        return next((fault for storm in self.storms if (fault := storm.decide(request)) is not None), None)


class Striker:
    """Strikes one stack.

    :param place: the store, past every proxy.
    :param disk: what the outputs are on, where it can be filled.
    :param on_stop: called when a scheduler has stopped itself: nobody knows before when that will be.
    """

    def __init__(
        self, stack: Stack, place: Place, disk: Disk | None, seed: int, on_stop: Callable[[], None]
    ) -> None:
        self.done: Counter[str] = Counter()
        """What was done, by kind; a strike that found nothing to strike counts for nothing."""
        self._stack = stack
        self._place = place
        self._disk = disk
        self._on_stop = on_stop
        self._seed = seed
        self._lasting: list[threading.Thread] = []
        self._weather = Weather([stack.credentials] if stack.credentials else [])
        self._lock = threading.Lock()

    def strike(self, strike: Strike, record: JobRecord | None, owner: str | None) -> bool:
        """Do it; what lasts goes on after the return. Whether there was something to strike.

        :param record: the job whose moment it is.
        :param owner: the scheduler that has it.
        """
        at = self._scheduler(owner, strike.owner) if strike.kind in AT_SCHEDULER else ""
        done = self._do(strike, at, record)
        self.done[str(strike.kind)] += done
        return done

    @property
    def is_over(self) -> bool:
        """Whether nothing lasts any more."""
        return not any(thread.is_alive() for thread in self._lasting)

    def wait(self) -> None:
        """Wait until nothing lasts any more."""
        for thread in self._lasting:
            thread.join()

    def _scheduler(self, owner: str | None, wanted: bool) -> str:
        """The owner, or the other one; the first when there is none."""
        pid = int(owner.split(":")[1]) if owner else 0
        own = next((name for name in SCHEDULERS if self._stack.pid(name) == pid), SCHEDULERS[0])
        return own if wanted else next(name for name in SCHEDULERS if name != own)

    def _do(self, strike: Strike, at: str, record: JobRecord | None) -> bool:
        stack = self._stack
        done = True
        match strike.kind:
            case Kind.KILL_API:
                done = self._kill(stack.pid("serve"))
            case Kind.KILL_SCHEDULER:
                done = self._kill(stack.pid(at))
            case Kind.KILL_REDIS:
                done = self._kill(stack.valkey.pid)
            case Kind.PAUSE_SCHEDULER:
                done = self._pause(stack.pid(at), strike.lasts_s)
            case Kind.PAUSE_COMMIT:
                done = self._hold(strike)
            case Kind.PARTITION_REDIS:
                self._last(self._partition, strike.lasts_s)
            case Kind.EMPTY_REDIS:
                pass  # done by whoever knows what was in it
            case Kind.POWER_CUT:
                stack.power_cut(strike.lasts_s)
            case Kind.LOSE_UPLOAD:
                done = self._lose_upload(record)
            case Kind.FULL_DISK:
                done = self._fill(strike.lasts_s)
            case kind if kind in ON_STORE:
                done = self._at_store(kind, strike.lasts_s)
            case kind:
                done = self._kill_in_fleet(kind, at)
        return done

    def _at_store(self, kind: Kind, lasts_s: float) -> bool:
        stack = self._stack
        if stack.s3 is None or stack.credentials is None:
            return False
        if kind == Kind.STORE_EXPIRED:
            if stack.credentials.can_run_out:
                self._last(self._expire, stack.credentials, lasts_s)
            return stack.credentials.can_run_out
        storm: Policy = Storm(f"{self._seed} {kind}", STORMS[kind], seconds=(0.1, 1.0))
        if kind == Kind.STORE_READ_FLIPS:
            storm = OfKnown(storm, self._place.begins)
        self._last(self._storm, stack.s3, storm, lasts_s)
        return True

    def _kill(self, pid: int | None) -> bool:
        return pid is not None and self._stack.kill(pid)

    def _kill_in_fleet(self, kind: Kind, at: str) -> bool:
        scheduler = self._stack.pid(at)
        found = fleet(scheduler) if scheduler else {}
        victim, warden = found.get(kind), found.get(Kind.KILL_WARDEN)
        if victim is None or warden is None:
            return False
        # The death of a worker is Ray's to mend; all others take the whole fleet with them.
        return self._stack.kill(victim.pid, victim.pid if kind == Kind.KILL_WORKER else warden.pid)

    def _pause(self, pid: int | None, lasts_s: float) -> bool:
        if pid is None:
            return False
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            return False  # it has just ended
        self._last(self._continue, pid, lasts_s)
        return True

    @staticmethod
    def _continue(pid: int, lasts_s: float) -> None:
        time.sleep(lasts_s)
        resume(pid)

    def _hold(self, strike: Strike) -> bool:
        self._stack.hold.ask(strike.step)
        self._last(self._pause_commit, strike)
        return False  # it counts when it happens

    def _pause_commit(self, strike: Strike) -> None:
        """Wait until somebody has stopped at the step of a commit; let him go on after a while."""
        hold, until = self._stack.hold, time.monotonic() + COMMIT_WITHIN_S
        busy_at = time.monotonic()
        while (pid := hold.taken()) is None and time.monotonic() < min(until, busy_at + IDLE_S):
            if self._is_busy():
                busy_at = time.monotonic()
            wait(until)
        hold.withdraw()
        if pid is not None or (pid := hold.taken()) is not None:
            self._on_stop()
            self.done[str(strike.kind)] += 1
            self._continue(pid, strike.lasts_s)

    def _is_busy(self) -> bool:
        """Whether any job goes on."""
        try:
            found = self._stack.jobs.list(20)
        except JobStoreUnavailableError:
            return True
        return any(not status.record.state.is_terminal for status in found.statuses)

    def _fill(self, lasts_s: float) -> bool:
        disk = self._disk
        if disk is None:
            return False

        def fill() -> None:
            until = time.monotonic() + lasts_s
            try:
                while time.monotonic() < until:
                    disk.fill()
                    wait(until)
            finally:
                disk.empty()

        self._last(fill)
        return True

    @staticmethod
    def _expire(credentials: Credentials, lasts_s: float) -> None:
        over = credentials.current
        if lasts_s:
            credentials.run_out(over)
            time.sleep(lasts_s)
            credentials.renew()
        else:
            credentials.renew()
            credentials.run_out(over)

    def _partition(self, lasts_s: float) -> None:
        with self._stack.without_redis():
            time.sleep(lasts_s)

    def _storm(self, proxy: FaultProxy, storm: Policy, lasts_s: float) -> None:
        with self._lock:
            self._weather.storms.append(storm)
            proxy.policy = self._weather
        time.sleep(lasts_s)
        with self._lock:
            self._weather.storms.remove(storm)

    def _lose_upload(self, record: JobRecord | None) -> bool:
        left = sorted(set(record.uploads) - set(record.completed_shards)) if record is not None else []
        if record is None or record.state.is_terminal or not left:
            return False
        self._place.store.abort(Upload(join(record.output, left[-1]), record.uploads[left[-1]]))
        return True

    def _last(self, action: object, *arguments: object) -> None:
        thread = threading.Thread(target=action, args=arguments)  # type: ignore[arg-type]
        thread.start()
        self._lasting.append(thread)


def fleet(scheduler: int) -> dict[Kind, Life]:
    """The processes of a scheduler's local Ray that may be killed; of its workers one that works, if one does."""
    return dict(_named(below(scheduler)))


def _named(lives: list[Life]) -> Iterator[tuple[Kind, Life]]:
    workers = []
    for life in lives:
        program = Path(life.command.split(" ")[0]).name
        if "service.cluster.warden" in life.command:
            yield Kind.KILL_WARDEN, life
        elif "-m service.cluster.fleet" in life.command:
            yield Kind.KILL_DRIVER, life
        elif program == "gcs_server":
            yield Kind.KILL_GCS, life
        elif program == "raylet":
            yield Kind.KILL_RAYLET, life
        elif (
            life.command.startswith("ray::") and "Agent" not in life.command
        ):  # the raylet's own end it with them
            workers.append(life)
    for life in sorted(workers, key=lambda life: life.command.startswith("ray::IDLE"))[:1]:
        yield Kind.KILL_WORKER, life
