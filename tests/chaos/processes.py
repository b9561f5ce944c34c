"""Who runs below whom on this machine, and whether those who were to die have died."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from service.cluster.warden import processes


@dataclass(frozen=True, slots=True)
class Life:
    """One process: its id may be given to another, later."""

    pid: int
    """Process id."""
    born: int
    """When it was started, in clock ticks since the machine was."""
    command: str = field(compare=False)
    """The beginning of its command line, which a process gets only some time after it is born."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended; one that was not waited for has."""
        stat = _stat(self.pid)
        return stat is None or stat[0] in "ZX" or int(stat[19]) != self.born


def below(root: int) -> list[Life]:
    """Every process below ``root``, in the order of the process table."""
    parents = {process.pid: process.parent for process in processes()}

    def is_below(pid: int) -> bool:
        while pid in parents and pid != root:
            pid = parents[pid]
        return pid == root

    found = (life_of(pid) for pid in parents if pid != root and is_below(pid))
    return [life for life in found if life is not None]


def life_of(pid: int) -> Life | None:
    """The process of this id now."""
    stat = _stat(pid)
    if stat is None or stat[0] in "ZX":
        return None
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    return Life(pid, int(stat[19]), command[:200].strip())


def kill(pid: int) -> bool:
    """``kill -9``; whether it was there to be killed."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def reap() -> None:
    """Wait for every child that has ended: what a subreaper adopts is nobody else's to wait for."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue


def still_there(lives: Iterable[Life], within_s: float) -> list[Life]:
    """Those that have not ended in time."""
    deadline = time.monotonic() + within_s
    left = list(lives)
    while left := [life for life in left if not life.is_over]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def _stat(pid: int) -> list[str] | None:
    """The fields of ``/proc/<pid>/stat`` from the state on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text.rpartition(") ")[2].split()
