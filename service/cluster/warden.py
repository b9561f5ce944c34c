"""Run a command, leave nothing of it: ``python -m service.cluster.warden PARENT_PID [--scratch DIR] -- COMMAND...``.

A local Ray is a dozen processes that outlive whoever started them when that one is killed: its agents go on
for up to a minute. The warden is the small process in between. It adopts every orphan below it
(``PR_SET_CHILD_SUBREAPER``), and when the command ends, the parent dies or a SIGTERM comes, it kills all
that is below it, waits until they are gone, and leaves with the command's exit status. The scratch
directory is the parent's to remove, unless that has died. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


class _Stop(BaseException):
    """SIGTERM came, from the parent or because the parent died."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def die_with_parent(parent: int, number: signal.Signals) -> None:
    """Have the kernel send us ``number`` when ``parent`` dies, or at once if it has died already.

    The parent, to Linux, is the thread that started us: it has to live as long as we are wanted.
    """
    _prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


@dataclass(frozen=True, slots=True)
class Process:
    """A line of the process table."""

    pid: int
    """Process id."""
    name: str
    """Name of the executable, its first 15 bytes."""
    parent: int
    """The parent's process id."""
    session: int
    """Process id of the session's leader, dead or alive."""


def processes() -> Iterator[Process]:
    """All processes that run; those that have ended and were not waited for are left out."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text(errors="replace")
        except OSError:  # it ended between the listing and the reading
            continue
        name, _, rest = stat.partition("(")[2].rpartition(") ")
        state, parent, _group, session = rest.split()[:4]
        if state not in "ZX":
            yield Process(int(entry.name), name, int(parent), int(session))


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def kill_children() -> None:
    """Kill and reap all descendants; orphans become our children, if we are a child subreaper."""
    me = os.getpid()
    while True:
        for process in processes():
            if process.parent == me:
                _kill(process.pid)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def kill_session(session: int, timeout_s: float = 5.0) -> bool:
    """Kill every process of a session whose warden was killed itself; whether all are gone in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [process.pid for process in processes() if process.session == session]
        if not left:
            return True
        if time.monotonic() > deadline:
            return False
        for pid in left:
            _kill(pid)
        time.sleep(0.02)


def _wait_for(child: int) -> int:
    """Reap orphans until ``child`` ends; its exit status, 128 + n for signal n."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


def _stop(number: int, frame: object) -> None:
    raise _Stop


def main() -> int:
    """Run the command of ``sys.argv``; returns its exit status."""
    parser = argparse.ArgumentParser(prog="service.cluster.warden")
    parser.add_argument("parent", type=int)
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    parent, command = arguments.parent, arguments.command
    signal.signal(signal.SIGTERM, _stop)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        die_with_parent(parent, signal.SIGTERM)
        return _wait_for(os.posix_spawnp(command[0], command, os.environ))
    except _Stop:
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kill_children()
        if arguments.scratch is not None and os.getppid() != parent:
            shutil.rmtree(arguments.scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
