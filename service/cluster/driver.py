"""Tasks on a cluster, from the scheduler's side: requests in, futures out; imports no Ray.

The work is done by a child (:mod:`service.cluster.fleet`) under a warden (:mod:`service.cluster.warden`). Whatever dies
there, the child, Ray's control process or its node, the child is started again and given every request that
is not finished. A request may therefore run more than once, and twice at the same time: tasks are idempotent.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from service.cluster.fleet_directory import fleet_directory
from service.cluster.fleet_process import FleetProcess, FleetSettings, Message
from service.watching import metrics
from workers.errors import FleetError, from_json
from workers.task import JSONValue

LONG_LIFE_S = 60.0
"""A child that lived this long counts as one that could be started."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """One call of a function somewhere in the cluster."""

    entry: str
    """``module:function`` that takes the payload and returns JSON; importable by the workers. See ``stream``."""
    payload: JSONValue
    """Its argument: small, and JSON."""
    memory_bytes: int
    """Peak memory of the worker process."""
    num_cpus: float = 1
    """CPU cores that it occupies."""
    num_gpus: float = 0
    """GPUs that it occupies."""
    label: str
    """What people call the task, in messages and in Ray's state."""
    ids: Mapping[str, str] = field(default_factory=dict)
    """What it is for (``job``, ``part``, …), in logs."""
    stream: str | None = None
    """Requests of one stream, with the same entry and needs, may go to one worker together, in order. Their entry
    is called with a list of payloads, and yields ``(index, value)`` or ``(index, MergemillError)`` for each, in any
    order: each answer is its future's about a second later at most. Where a worker died, what it left unfinished
    goes again, each request in a list of its own."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the cluster offers, whether free or taken."""

    cpus: float
    """CPU cores of all nodes."""
    gpus: float
    """GPUs of all nodes."""
    nodes: int
    """Nodes that are alive."""
    max_node_memory_bytes: int
    """Memory for tasks on the node that has most."""


@dataclass(slots=True)
class _Pending:
    label: str
    ids: dict[str, str]
    line: str
    future: Future[JSONValue]
    started: bool = False
    losses: int = 0

    def fail(self, why: str) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(FleetError(why))


class Driver:
    """A handle on the cluster. Thread safe; a context manager that starts and closes it."""

    def __init__(self, settings: FleetSettings | None = None) -> None:
        self.settings = settings or FleetSettings()
        self.restarts = 0
        """How often the child was started again."""
        self.retries = 0
        """How often a task was started again because its worker died."""
        self._lock = threading.Condition()
        self._pending: dict[int, _Pending] = {}
        self._next_id = 0
        self._child: FleetProcess | None = None
        self._capacity: Capacity | None = None
        self._failure: str | None = None
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the warden, if there is one: all that the fleet runs on this machine is below it."""
        child = self._child
        return None if child is None else child.pid

    @property
    def in_flight(self) -> int:
        """Tasks that the cluster has now, running or about to; the others wait in the child."""
        with self._lock:
            return sum(pending.started for pending in self._pending.values())

    @property
    def known_capacity(self) -> Capacity | None:
        """What the cluster offers, if it is up; asks nothing of it, unlike :meth:`capacity`."""
        return self._capacity

    def start(self) -> None:
        """Begin to start or connect to Ray; does not wait for it."""
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._supervise, name="fleet", daemon=True)
                self._thread.start()

    def submit(self, request: TaskRequest) -> Future[JSONValue]:
        """Queue a call. Its future raises what the function raised, or :class:`workers.errors.FleetError`.

        :raises FleetError: the driver is not started, or closed.
        :raises ValueError: the payload holds NaN or an infinity.
        """
        # Not `asdict`, which would copy the payload object by object.
        message = {each.name: getattr(request, each.name) for each in fields(request)}
        message |= {"payload": json.dumps(request.payload, allow_nan=False), "ids": dict(request.ids)}
        future: Future[JSONValue] = Future()
        with self._lock:
            if self._closed or self._thread is None:
                raise FleetError("the fleet is closed" if self._closed else "the fleet is not started")
            number, self._next_id = self._next_id, self._next_id + 1
            line = json.dumps({"op": "submit", "id": number, **message})
            self._pending[number] = pending = _Pending(request.label, dict(request.ids), line, future)
            if self._child is not None:
                self._child.send(pending.line)
            self._demand()
        future.add_done_callback(functools.partial(self._withdraw, number))
        return future

    def cancel(self, future: Future[JSONValue]) -> bool:
        """Give a call up, even one that is running; false when it had already finished."""
        return future.cancel()

    def capacity(self, timeout_s: float | None = None) -> Capacity:
        """What the cluster offers now; waits until it is up.

        :raises FleetError: it did not come up, or not in time.
        """
        with self._lock:
            self._demand()
            self._lock.wait_for(lambda: self._capacity or self._failure or self._closed, timeout_s)
            if self._capacity is None:
                closed = "the fleet is closed" if self._closed else "the fleet is not up yet"
                raise FleetError(self._failure or closed)
            return self._capacity

    def close(self) -> None:
        """End the child and all that it started; what is unfinished fails."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.send(None)
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
        for pending in self._take_all():
            pending.fail("the fleet was closed")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _demand(self) -> None:
        """After a failure, whoever wants something is the reason to try again."""
        self._failure = None
        self._lock.notify_all()

    def _withdraw(self, number: int, future: Future[JSONValue]) -> None:
        """A future is done; if its owner cancelled it, the child is told."""
        if not future.cancelled():
            return
        with self._lock:
            pending = self._pending.pop(number, None)
            if pending is not None and self._child is not None:
                self._child.send(json.dumps({"op": "cancel", "id": number}))
        if pending is not None:
            future.set_running_or_notify_cancel()  # wakes those who wait for it

    def _take_all(self) -> list[_Pending]:
        with self._lock:
            taken, self._pending = list(self._pending.values()), {}
        return taken

    # From here on: the supervising thread, which owns the child.

    def _supervise(self) -> None:
        with fleet_directory(self.settings.state_dir) as directory:
            self._keep_up(directory)

    def _keep_up(self, directory: Path) -> None:
        barren = 0
        while self._wanted():
            fruitful, why = self._live(directory)
            if self._closed:
                return
            log.warning("fleet child ended", why=why, restarts=self.restarts)
            barren = 1 if fruitful else barren + 1
            if barren >= self.settings.max_starts:
                barren = 0
                self._give_up(f"Ray could not be kept up: {why}")
                continue
            self._count_losses(why)
            self.restarts += 1
            metrics.FLEET_RESTARTS.inc()
            with self._lock:
                self._lock.wait_for(lambda: self._closed, timeout=min(30.0, 0.25 * 2**barren))

    def _wanted(self) -> bool:
        """Wait until there is reason to start a child; false when the driver was closed."""
        with self._lock:
            self._lock.wait_for(lambda: self._closed or self._failure is None)
            return not self._closed

    def _live(self, directory: Path) -> tuple[bool, str]:
        """One life of a child: whether it got anything done, and why it ended."""
        with self._lock:
            lines = [pending.line for pending in self._pending.values()]
            self._child = child = FleetProcess(self.settings, directory, lines)
        born, fruitful = time.monotonic(), False
        for message in child.messages(lambda: self._closed):
            self._handle(message)
            fruitful = fruitful or message["op"] == "result"
        fruitful = fruitful or (child.ready and time.monotonic() - born > LONG_LIFE_S)
        with self._lock:
            self._child = self._capacity = None
        if not child.end(gently=self._closed and child.ready):
            log.error("processes of the fleet could not be killed", session=child.pid)
        return fruitful, f"{child.why}\n{child.last_words()}".strip()

    def _handle(self, message: Message) -> None:
        match message["op"]:
            case "nodes":
                nodes = message["nodes"]
                with self._lock:
                    self._capacity = Capacity(
                        cpus=sum(cpus for cpus, _, _ in nodes),
                        gpus=sum(gpus for _, gpus, _ in nodes),
                        nodes=len(nodes),
                        max_node_memory_bytes=max((memory for _, _, memory in nodes), default=0),
                    )
                    self._lock.notify_all()
            case "started":
                with self._lock:
                    for number in message["ids"]:
                        if (pending := self._pending.get(number)) is not None:
                            pending.started = True
            case "retry":
                self.retries += 1
                metrics.task_retried(message["cause"])
                with self._lock:
                    retried = self._pending.get(message["id"])
                ids = retried.ids if retried else {}
                log.warning("task retried", task=message["label"], cause=message["cause"], **ids)
            case "result":
                with self._lock:
                    pending = self._pending.pop(message["id"], None)
                if pending is not None and pending.future.set_running_or_notify_cancel():
                    body = json.loads(message["body"])
                    if "error" in body:
                        pending.future.set_exception(from_json(body["error"]))
                    else:
                        pending.future.set_result(body["value"])

    def _count_losses(self, why: str) -> None:
        """A child died with what it was running; a task that does that again and again is given up."""
        lost = []
        with self._lock:
            for number, pending in list(self._pending.items()):
                pending.losses += pending.started
                metrics.TASK_RETRIES.labels(metrics.FLEET_DIED).inc(pending.started)
                pending.started = False
                if pending.losses >= self.settings.max_losses:
                    lost.append(self._pending.pop(number))
        for pending in lost:
            pending.fail(f"{pending.label}: given up after Ray's driver died {pending.losses} times: {why}")

    def _give_up(self, why: str) -> None:
        with self._lock:
            self._failure = why
            self._lock.notify_all()
            lost = self._take_all()
        for pending in lost:
            pending.fail(why)
