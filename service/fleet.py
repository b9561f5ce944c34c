"""Ray's driver process: ``python -m service.fleet RESULT_FD``, started by :mod:`service.driver`.

The only file that imports Ray. When Ray's control process dies, Ray ends the process that is connected to
it; so that process is this one, which holds nothing that its parent does not know as well.

The protocol is JSON lines. On stdin come the configuration, then ``submit`` and ``cancel``; through the
result descriptor go ``nodes`` (every second: the sign of life), ``started``, ``retry`` and ``result``, and
before them ``vital``, the processes that we cannot do without. When stdin ends, so does this process. All else
that is printed, by Ray or by us, goes to stderr.
"""

from __future__ import annotations

import ctypes
import functools
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
from dataclasses import dataclass
from typing import IO, Any

import ray
from ray import exceptions

from service.dispatch import Dispatcher, Need, Node, Policy
from service.warden import die_with_parent, processes
from workers.errors import FleetError, MergemillError, to_json

TICK_S = 1.0
"""Seconds between two looks at the cluster."""

OWN_NODE_LOST = 3
"""Exit status when the node that we are connected through is dead."""

Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Line:
    """A message from the parent; ``None`` when it closed the pipe."""

    message: Message | None


@dataclass(frozen=True, slots=True)
class _Done:
    """Ray is done with one try of a task."""

    task: int
    number: int
    """Which try; a cancelled or given up one may still report."""
    answer: Any
    """A concurrent future with :func:`run_entry`'s text or Ray's exception."""


def run_entry(entry: str, payload: str) -> str:
    """Call ``module:function`` with a payload, in a worker: JSON text in, ``{"value"}`` or ``{"error"}`` out.

    What the function raises comes back as JSON as well, since Ray would pickle it. Afterwards all free
    memory goes back to the system, so that the next task begins where this one did.
    """
    try:
        module, _, function = entry.partition(":")
        value = getattr(importlib.import_module(module), function)(json.loads(payload))
        return json.dumps({"value": value}, allow_nan=False)
    except MergemillError as error:
        return json.dumps({"error": to_json(error)})
    except Exception as error:  # noqa: BLE001 - whatever it is, it is this task's result and no other's
        last_lines = "".join(traceback.format_exception(error)[-3:]).strip()
        return json.dumps({"error": to_json(FleetError(f"{entry} failed: {last_lines}"))})
    finally:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # glibc
            libc.malloc_trim(0)


class Fleet:
    """The loop between the parent's pipe and Ray."""

    def __init__(self, results: IO[str]) -> None:
        self._results = results
        self._inbox: queue.Queue[_Line | _Done] = queue.Queue()
        self._dispatcher = Dispatcher()
        self._work: dict[int, Message] = {}
        self._refs: dict[int, Any] = {}
        self._own_node = ""
        # By value, so that a worker needs only the packages that the entries name.
        self._remote = ray.remote(run_entry)

    def run(self) -> int:
        """Serve the parent until it closes the pipe; returns the exit status."""
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        next_look = time.monotonic()
        while True:
            try:
                event = self._inbox.get(timeout=max(0.0, next_look - time.monotonic()))
            except queue.Empty:
                if not self._look():
                    return OWN_NODE_LOST
                next_look = time.monotonic() + TICK_S
            else:
                if isinstance(event, _Done):
                    self._done(event)
                elif event.message is None:
                    return 0
                else:
                    self._request(event.message)
            self._start()

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
        need = Need(message["memory_bytes"], message["num_cpus"], message["num_gpus"], message["label"])
        refusal = self._dispatcher.add(task, need)
        if refusal is not None:
            self._fail(task, refusal)

    def _start(self) -> None:
        for task in self._dispatcher.start(time.monotonic()):
            work = self._work[task]
            # Ray's own retries are off: those for memory have no bound, and none are told to anybody.
            ref = self._remote.options(
                name=work["label"],
                memory=work["memory_bytes"],
                num_cpus=work["num_cpus"],
                num_gpus=work["num_gpus"],
                max_retries=0,
            ).remote(work["entry"], work["payload"])
            self._refs[task] = ref
            self._send(op="started", id=task)
            number = self._dispatcher.tries(task)
            ref.future().add_done_callback(functools.partial(self._report, task, number))

    def _report(self, task: int, number: int, answer: Any) -> None:
        """Called by a thread of Ray's."""
        self._inbox.put(_Done(task, number, answer))

    def _done(self, event: _Done) -> None:
        task = event.task
        if task not in self._dispatcher.running or self._dispatcher.tries(task) != event.number:
            return  # cancelled or given up in the meantime
        self._refs.pop(task, None)
        error = event.answer.exception()
        if error is None:
            self._forget(task)
            self._send(op="result", id=task, body=event.answer.result())
        elif isinstance(error, exceptions.RayTaskError):  # run_entry itself could not be loaded or called
            self._fail(task, f"{self._work[task]['label']}: {error}")
        elif isinstance(error, exceptions.RayError):
            told = " ".join(str(error).splitlines()[:2])  # after a memory kill, a page of statistics follows
            cause = f"{type(error).__name__}: {told}"
            oom = isinstance(error, exceptions.OutOfMemoryError)
            given_up = self._dispatcher.crashed(task, cause, time.monotonic(), out_of_memory=oom)
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
        """Forget a task, wherever it is; what runs is killed."""
        ref = self._refs.pop(task, None)
        self._forget(task)
        if ref is not None:
            ray.cancel(ref, force=True)

    def _forget(self, task: int) -> None:
        self._dispatcher.remove(task)
        self._work.pop(task, None)


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
