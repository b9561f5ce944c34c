"""What the processes of a stack use: CPU time and peaks of memory, by who they are."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.groups import Entry, family, memory, process_table

SCHEDULING = ("scheduler", "driver")
"""Our own processes around the workers, but for the API: what decides, and what talks to Ray."""
ROLES = (*SCHEDULING, "valkey", "ray", "api")
"""Who uses CPU time beside the workers."""

SAMPLE_S = 0.2
_TICKS = os.sysconf("SC_CLK_TCK")

Used = Mapping[str, float]
"""CPU seconds by role."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What was used so far."""

    at: float
    """When, in Unix seconds."""
    cpu_s: Used
    """User and system time by role."""


def role_of(command: str) -> str | None:
    """Who a process below the scheduler is, by its command line; ``None`` for a worker."""
    for words, role in (("benchmarks.hollow", "scheduler"), ("service.cluster.fleet", "driver")):
        if words in command:  # and the warden, which names what it watches
            return role
    return None if command.startswith("ray::") or "default_worker.py" in command else "ray"


class Processes:
    """The processes of a stack: what they used so far, the ended ones included."""

    def __init__(self, roots: Mapping[int, str | None]) -> None:
        """
        :param roots: role of each by its id; ``None`` where command lines tell, as they do of all below it.
        """
        self._roots = roots
        self._known = {pid: entry for pid, entry in process_table().items() if pid in roots}
        self._roles: dict[int, str | None] = {}
        self._ticks: dict[tuple[int, int], tuple[str, int]] = {}

    def sample(self) -> Sample:
        """Look at all of them now."""
        self._known = family(process_table(), self._known)
        for pid, entry in self._known.items():
            role = self._role(pid, entry)
            if role is not None:
                self._ticks[pid, entry.born] = role, entry.ticks
        cpu_s = dict.fromkeys(ROLES, 0.0)
        for role, ticks in self._ticks.values():
            cpu_s[role] += ticks / _TICKS
        return Sample(time.time(), cpu_s)

    def forget_peaks(self) -> None:
        """Let VmHWM of the scheduler and its driver begin anew."""
        for pid in self._of(*SCHEDULING):
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def peaks(self) -> dict[str, int]:
        """VmHWM of the scheduler and its driver; the biggest, where they are several."""
        return {role: max(memory(pid).peak for pid in self._of(role)) for role in SCHEDULING}

    def _of(self, *roles: str) -> list[int]:
        return [pid for pid in self._known if self._roles.get(pid) in roles]

    def _role(self, pid: int, entry: Entry) -> str | None:
        own = self._roots.get(pid)
        if own is None:
            # Read again each time: a worker is the interpreter first, then idle, then a task by its name.
            with contextlib.suppress(OSError):
                command = (
                    Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                )
                own = role_of(command)
        self._roles[pid] = own
        return own


class Watch:
    """Samples, taken in a ``with`` block."""

    def __init__(self, processes: Processes) -> None:
        self.samples: list[Sample] = []
        self._processes = processes
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self.samples.append(self._processes.sample())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.samples.append(self._processes.sample())

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.samples.append(self._processes.sample())
