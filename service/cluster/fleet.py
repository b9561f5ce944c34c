"""Ray's driver process: ``python -m service.cluster.fleet RESULT_FD``, started by :mod:`service.cluster.driver`.

The only file that imports Ray. When Ray's control process dies, Ray ends the process that is connected to
it; so that process is this one, which holds nothing that its parent does not know as well.

The protocol is JSON lines. On stdin come the configuration, then ``submit`` and ``cancel``; through the
result descriptor go ``nodes`` (every second: the sign of life), ``started``, ``retry`` and ``result``, and
before them ``vital``, the processes that we cannot do without. When stdin ends, so does this process. All else
that is printed, by Ray or by us, goes to stderr.

Everything is a Ray generator task, which answers for one request or, in a stream, for several: results are sent
on about every second, and when the task ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import ray
from ray import exceptions

from service.cluster.dispatch import Batch, Dispatcher, Need, Node, Policy
from service.cluster.warden import die_with_parent, processes
from workers.errors import FleetError, MergemillError, to_json

TICK_S = 1.0
"""Seconds between two looks at the cluster."""

GATHER_S = 1.0
"""How long a worker's answer may wait for others to be sent with, in seconds."""

OWN_NODE_LOST = 3
"""Exit status when the node that we are connected through is dead."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Line:
    """A message from the parent; ``None`` when it closed the pipe."""

    message: Message | None


@dataclass(frozen=True, slots=True)
class _Result:
    """A worker is done with one request."""

    batch: int
    index: int
    """Which of the batch's requests."""
    body: str
    """What :func:`run_entry` says about it."""


@dataclass(frozen=True, slots=True)
class _End:
    """Ray is done with a batch."""

    batch: int
    error: Exception | None
    """Ray's."""


_Event = _Line | _Result | _End


def run_gathered(entry: str, streamed: bool, *payloads: str) -> Iterator[list[tuple[int, str]]]:
    """What :func:`run_entry` says, in lists, none later than ``GATHER_S``: each costs Ray and its driver a message.

    The entry runs in a thread of its own, so that an answer never waits for the next one.
    """
    said: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()

    def call() -> None:
        try:
            for answer in run_entry(entry, streamed, *payloads):
                said.put(answer)
        finally:
            said.put(None)

    threading.Thread(target=call, name="entry", daemon=True).start()
    while (answer := said.get()) is not None:
        answers, until = [answer], time.monotonic() + GATHER_S
        try:
            while (answer := said.get(timeout=max(0.0, until - time.monotonic()))) is not None:
                answers.append(answer)
        except queue.Empty:
            yield answers
        else:
            yield answers
            return


def run_entry(entry: str, streamed: bool, *payloads: str) -> Iterator[tuple[int, str]]:
    """Call ``module:function``: JSON texts in, an index and ``{"value"}`` or ``{"error"}`` out for each.

    A plain entry is called with one payload and returns its value. A streamed one is called once with the list
    of payloads, and yields ``(index, value)`` or ``(index, MergemillError)``, each index once, in any order.

    What the function raises comes back as JSON as well, since Ray would pickle it; from a stream, as the result of
    every request that has none yet. The last result waits until the function has ended, and all free memory
    has gone back to the system: whoever has it can count on the worker being where it was at the beginning.
    """
    missing = set(range(len(payloads)))
    held: list[tuple[int, str]] = []
    try:
        module, _, name = entry.partition(":")
        function = getattr(importlib.import_module(module), name)
        arguments = [json.loads(payload) for payload in payloads]
        for index, value in function(arguments) if streamed else enumerate(map(function, arguments)):
            if index not in missing:
                raise FleetError(f"{entry} gave a result for {index!r}, which has one or was not asked for")
            missing.remove(index)
            held.append((index, _body(entry, value)))
            if missing:
                yield held.pop()
        if missing:
            raise FleetError(f"{entry} ended without a result")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is these requests' result and no others'
        missing.update(index for index, _ in held)
        held = [(index, _error(entry, error)) for index in sorted(missing)]
    finally:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)
    yield from held


def _body(entry: str, value: object) -> str:
    if isinstance(value, MergemillError):
        return _error(entry, value)
    try:
        return json.dumps({"value": value}, allow_nan=False)
    except (TypeError, ValueError) as error:
        return _error(entry, error)


def _error(entry: str, error: Exception) -> str:
    if not isinstance(error, MergemillError):
        last_lines = "".join(traceback.format_exception(error)[-3:]).strip()
        error = FleetError(f"{entry} failed: {last_lines}")
    return json.dumps({"error": to_json(error)})


class Fleet:
    """The loop between the parent's pipe and Ray."""

    def __init__(self, results: IO[str]) -> None:
        self._results = results
        self._inbox: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._dispatcher = Dispatcher()
        self._work: dict[int, Message] = {}
        self._generators: dict[int, ray.ObjectRefGenerator] = {}
        self._own_node = ""
        # By value, so that a worker needs only the packages that the entries name.
        self._remote = ray.remote(run_gathered)
        self._followers = asyncio.new_event_loop()

    def run(self) -> int:
        """Serve the parent until it closes the pipe; returns the exit status."""
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        threading.Thread(target=self._followers.run_forever, name="followers", daemon=True).start()
        next_look = time.monotonic()
        while True:
            if time.monotonic() >= next_look:
                if not self._look():
                    return OWN_NODE_LOST
                next_look = time.monotonic() + TICK_S
            for event in self._events(next_look):
                match event:
                    case _Result():
                        self._result(event)
                    case _End():
                        self._end(event)
                    case _Line(message=None):
                        return 0
                    case _Line(message=dict(message)):
                        self._request(message)
            self._start()

    def _events(self, until: float) -> Iterator[_Event]:
        """What comes first, and all that has come with it: a stream needs requests to choose its size from."""
        try:
            yield self._inbox.get(timeout=max(0.0, until - time.monotonic()))
            while True:
                yield self._inbox.get_nowait()
        except queue.Empty:
            return

    def configure(self, config: Message) -> None:
        """Connect to Ray."""
        connect(config)
        if config["address"] is None:
            # Calls into Ray that need a dead control process hang with the interpreter's lock in their hands:
            # nothing in here would notice, so the parent watches.
            self._send(op="vital", pids=ray_processes())
        self._dispatcher.policy = Policy(**config["policy"])
        if not str(config["address"]).startswith("ray://"):
            self._own_node = ray.get_runtime_context().get_node_id()

    def _read(self) -> None:
        for line in sys.stdin:
            self._inbox.put(_Line(json.loads(line)))
        self._inbox.put(_Line(None))

    def _send(self, **message: object) -> None:
        self._results.write(json.dumps(message) + "\n")
        self._results.flush()

    def _look(self) -> bool:
        """See what the cluster is now; whether we still belong to it."""
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        if self._own_node and all(node["NodeID"] != self._own_node for node in alive):
            return False
        resources = [node["Resources"] for node in alive]
        nodes = [
            Node(its.get("CPU", 0.0), its.get("GPU", 0.0), int(its.get("memory", 0))) for its in resources
        ]
        self._dispatcher.set_nodes(nodes)
        self._send(op="nodes", nodes=[(node.cpus, node.gpus, node.memory_bytes) for node in nodes])
        for task, why in self._dispatcher.hopeless(time.monotonic()):
            self._fail(task, why)
        return True

    def _request(self, message: Message) -> None:
        task = int(message["id"])
        if message["op"] == "cancel":
            self._drop(task)
            return
        self._work[task] = message
        stream, payload_bytes = message["stream"], len(message["payload"])
        need = Need(
            message["memory_bytes"],
            message["num_cpus"],
            message["num_gpus"],
            message["label"],
            stream if stream is None else f"{message['entry']} {stream}",
            payload_bytes,
        )
        refusal = self._dispatcher.add(task, need)
        if refusal is not None:
            self._fail(task, refusal)

    def _start(self) -> None:
        for batch in self._dispatcher.start(time.monotonic()):
            works = [self._work[task] for task in batch.tasks]
            first, others = works[0], len(works) - 1
            # Ray's own retries are off: those for memory have no bound, and none are told to anybody.
            generator = self._remote.options(
                name=f"{first['label']} and {others} more" if others else first["label"],
                memory=first["memory_bytes"],
                num_cpus=first["num_cpus"],
                num_gpus=first["num_gpus"],
                num_returns="streaming",
                max_retries=0,
            ).remote(first["entry"], first["stream"] is not None, *(work["payload"] for work in works))
            self._generators[batch.number] = generator
            self._send(op="started", ids=batch.tasks)
            asyncio.run_coroutine_threadsafe(self._follow(batch, generator), self._followers)

    async def _follow(self, batch: Batch, generator: ray.ObjectRefGenerator) -> None:
        """Pass on what a batch says, in a thread that all of them share."""
        ended = None
        try:
            async for answer in generator:
                for index, body in await answer:
                    self._inbox.put(_Result(batch.number, index, body))
        except Exception as error:  # noqa: BLE001 - raised where it is understood
            ended = error
        self._inbox.put(_End(batch.number, ended))

    def _result(self, event: _Result) -> None:
        task = self._dispatcher.finished(event.batch, event.index)
        if task is not None:  # not cancelled in the meantime
            del self._work[task]
            self._send(op="result", id=task, body=event.body)

    def _end(self, event: _End) -> None:
        if self._generators.pop(event.batch, None) is None:
            return  # we ended it
        error = event.error
        if error is None or isinstance(error, exceptions.RayTaskError):
            for task in self._dispatcher.ended(event.batch):  # run_entry itself could not be loaded or called
                self._fail(task, f"{self._work[task]['label']}: {error}")
        elif isinstance(error, exceptions.RayError):
            told = " ".join(str(error).splitlines()[:2])  # after a memory kill, a page of statistics follows
            cause = f"{type(error).__name__}: {told}"
            oom = isinstance(error, exceptions.OutOfMemoryError)
            fates = self._dispatcher.crashed(event.batch, cause, time.monotonic(), out_of_memory=oom)
            for task, given_up in fates:
                if given_up is None:
                    self._send(op="retry", id=task, label=self._work[task]["label"], cause=cause)
                else:
                    self._fail(task, given_up)
        else:
            raise error

    def _fail(self, task: int, why: str) -> None:
        self._drop(task)
        self._send(op="result", id=task, body=json.dumps({"error": to_json(FleetError(why))}))

    def _drop(self, task: int) -> None:
        """Forget a task, wherever it is; a worker that has nothing else to do is killed."""
        self._work.pop(task, None)
        batch = self._dispatcher.remove(task)
        if batch is not None:
            ray.cancel(self._generators.pop(batch), force=True)


def connect(config: Message) -> None:
    """Connect to the Ray of ``config["address"]``, or start one here when that is ``None``."""
    if config["address"] is not None:
        # Workers of a Ray of our own inherit our environment; these do not.
        ray.init(
            address=config["address"],
            log_to_driver=False,
            logging_level=logging.WARNING,
            runtime_env={"env_vars": config["worker_env"]},
        )
        return
    ray.init(
        address="local",
        num_cpus=config["num_cpus"],
        num_gpus=config["num_gpus"],
        _memory=config["memory_bytes"],
        object_store_memory=config["object_store_bytes"],
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.WARNING,
        _temp_dir=config["temp_dir"],
    )


def ray_processes() -> list[int]:
    """Process ids of our own Ray's control process and node, without which it is of no use."""
    me = os.getpid()
    return [its.pid for its in processes() if its.parent == me and its.name in ("gcs_server", "raylet")]


def main() -> int:
    """Read the configuration, connect, serve; returns the exit status."""
    die_with_parent(os.getsid(0), signal.SIGKILL)  # the warden leads our session
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w", encoding="utf-8") as results:
        fleet = Fleet(results)
        config = json.loads(sys.stdin.readline())
        fleet.configure(config)
        status = fleet.run()
    if config["address"] is not None:
        ray.shutdown()  # the cluster lives on, and should not have to find out that we are gone
    return status


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a Ray of our own is ended by the warden, faster than by Ray's exit handlers
