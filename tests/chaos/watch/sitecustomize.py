"""Imported by every Python that starts with this directory on its path: a Ray worker tells of each part that it begins.

A line of JSON a part goes to the file that ``MERGEMILL_CHAOS_WITNESS`` names. ``MERGEMILL_CHAOS_PAUSE_S`` holds each
part up, and one that has ``MERGEMILL_CHAOS_POISON`` in it kills its worker.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ENTRY = "workers.entry"


Begin = Callable[[Any, Any], Any]


class Watch:
    """A finder that is asked for :data:`ENTRY` once, and watches it."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that puts :func:`watched` in place."""
        if name != ENTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            spec.loader = Loader(spec.loader)
        return spec


class Loader(importlib.abc.Loader):
    """Another loader, and what it loads is watched."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> Any:
        """As the other."""
        return self._own.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """As the other, and a little more."""
        self._own.exec_module(module)
        module._task = watched(module._task)


def watched(begin: Begin) -> Begin:
    """``begin``, of a task's payload, with a note of each part that it is called for."""
    pause_s, poison = float(os.environ["MERGEMILL_CHAOS_PAUSE_S"]), os.environ["MERGEMILL_CHAOS_POISON"]

    def noted(payload: Any, tools: Any) -> Any:
        if "part" in payload:
            ids = payload["ids"]
            line = {"at": time.time(), "job": ids["job"], "part": ids["part"], "pid": os.getpid()}
            # One write at the end of a file is whole, whoever else writes.
            file = os.open(os.environ["MERGEMILL_CHAOS_WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, json.dumps(line).encode() + b"\n")
            os.close(file)
            time.sleep(pause_s)
            if poison in payload["part"]:
                os.kill(os.getpid(), signal.SIGKILL)
        return begin(payload, tools)

    return noted


if "MERGEMILL_CHAOS_WITNESS" in os.environ:
    sys.meta_path.insert(0, Watch())
