"""Imported by every Python that starts with this directory on its path: a Ray worker tells of each part that it begins.

A line of JSON a part goes to the file that ``MERGEMILL_CHAOS_WITNESS`` names. ``MERGEMILL_CHAOS_PAUSE_S`` holds each
part up, and one that has ``MERGEMILL_CHAOS_POISON`` in it kills its worker.
"""

import importlib.util
import json
import os
import signal
import sys
import time
from importlib.machinery import ModuleSpec
from types import ModuleType

ENTRY = "workers.entry"


class Watch:
    """A finder that is asked for :data:`ENTRY` once, and watches it."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        """The module's own spec, with a loader that puts :func:`watched` in place."""
        if name != ENTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            module._task = watched(module._task)

        spec.loader.exec_module = exec_module
        return spec


def watched(begin):
    """``begin``, of a task's payload, with a note of each part that it is called for."""
    pause_s, poison = float(os.environ["MERGEMILL_CHAOS_PAUSE_S"]), os.environ["MERGEMILL_CHAOS_POISON"]

    def noted(payload, tools):
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
