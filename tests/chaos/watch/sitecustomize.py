"""Imported by every Python that starts with this directory on its path, and tells what is done in it.

A Ray worker writes a line of JSON for each part that it begins to the file that ``MERGEMILL_CHAOS_WITNESS`` names.
``MERGEMILL_CHAOS_PAUSE_S`` holds each part up, and one that has ``MERGEMILL_CHAOS_POISON`` in it kills its worker.

Whoever has leases writes a line to ``MERGEMILL_CHAOS_OWNERS`` for each thing that was done under one. While there is a
file ``MERGEMILL_CHAOS_HOLD``, which has the number of a change of a commit, the process that comes to that change first
takes the file away, leaves its id, and stops itself, as by SIGSTOP.
"""

import functools
import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

Begin = Callable[[Any, Any], Any]


class Watch:
    """A finder that is asked for each watched module once."""

    def __init__(self, watched: dict[str, Callable[[Any], None]]) -> None:
        self._watched = watched

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that puts what watches in place."""
        put = self._watched.pop(name, None)
        if put is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = Loader(spec.loader, put)
        return spec


class Loader(importlib.abc.Loader):
    """Another loader, and what it loads is watched."""

    def __init__(self, own: Any, put: Callable[[Any], None]) -> None:
        self._own = own
        self._put = put

    def create_module(self, spec: ModuleSpec) -> Any:
        """As the other."""
        return self._own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """As the other, and a little more."""
        self._own.exec_module(module)
        self._put(module)


def note(path: str, told: dict[str, Any]) -> None:
    """Add a line. One write at the end of a file is whole, whoever else writes."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, json.dumps(told).encode() + b"\n")
    os.close(file)


def watch_parts(entry: Any) -> None:
    """Have ``workers.entry`` tell of each part that it begins."""
    entry._task = watched(entry._task)


def watched(begin: Begin) -> Begin:
    """``begin``, of a task's payload, with a note of each part that it is called for."""
    pause_s, poison = float(os.environ["MERGEMILL_CHAOS_PAUSE_S"]), os.environ["MERGEMILL_CHAOS_POISON"]

    def noted(payload: Any, tools: Any) -> Any:
        if "part" in payload:
            ids = payload["ids"]
            line = {"at": time.time(), "job": ids["job"], "part": ids["part"], "pid": os.getpid()}
            note(os.environ["MERGEMILL_CHAOS_WITNESS"], line)
            time.sleep(pause_s)
            if poison in payload["part"]:
                os.kill(os.getpid(), signal.SIGKILL)
        return begin(payload, tools)

    return noted


def watch_leases(jobstore: Any) -> None:
    """Have the job store tell of what it did under leases, and stop where it is told to."""
    store, hold = jobstore.JobStore, Hold(Path(os.environ["MERGEMILL_CHAOS_HOLD"]))

    def told(name: str, of: Callable[..., tuple[str, str] | None]) -> None:
        own = getattr(store, name)

        @functools.wraps(own)
        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            began = time.monotonic()
            answer = own(self, *arguments, **named)
            ended = time.monotonic()
            if (found := of(answer, *arguments, **named)) is not None:
                job, token = found
                line = {"job": job, "token": token, "what": name, "began": began, "ended": ended}
                note(os.environ["MERGEMILL_CHAOS_OWNERS"], {**line, "pid": os.getpid()})
                hold.look(job, name, arguments)
            return answer

        setattr(store, name, call)

    def of_lease(_: Any, lease: Any, *__: Any, **___: Any) -> tuple[str, str]:
        return lease.job, lease.token

    def of_event(_: Any, job: str, event: Any, token: str | None = None) -> tuple[str, str] | None:
        return None if token is None else (job, token)

    def of_claimed(claimed: Any, *_: Any, **__: Any) -> tuple[str, str] | None:
        return None if claimed is None else (claimed[1].job, claimed[1].token)

    for name in ("renew", "record_part", "record_survey", "warn", "claim_output", "release_output"):
        told(name, of_lease)
    told("apply", of_event)
    told("claim_next", of_claimed)


class Hold:
    """Stops this process at the change of a commit that the file names. A change is what a lease is renewed for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changes: Counter[str] = Counter()
        self._committing: set[str] = set()

    def look(self, job: str, what: str, arguments: tuple[Any, ...]) -> None:
        """See whether this is the moment, after something was done."""
        if what == "apply" and type(arguments[1]).__name__ in {"CommitStarted", "ShardCompleted"}:
            self._committing.add(job)
        if what != "renew" or job not in self._committing or threading.current_thread().name == "leases":
            return
        try:
            step = int(self._path.read_text())
        except FileNotFoundError:
            return
        self._changes[job] += 1
        if self._changes[job] <= step:
            return
        taken = self._path.with_suffix(".taken")
        try:
            self._path.replace(self._path.with_suffix(".gone"))
        except FileNotFoundError:  # somebody else was first
            return
        taken.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)


if "MERGEMILL_CHAOS_WITNESS" in os.environ:
    sys.meta_path.insert(0, Watch({"workers.entry": watch_parts, "service.jobs.jobstore": watch_leases}))
