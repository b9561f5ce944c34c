"""Where a fleet keeps Ray's sockets and logs: a directory of its own, and an end to what others have left in theirs.

A warden ends its fleet, and a scheduler whose warden was killed does. When both are killed at once, nobody is left who
knows of it, and Ray's agents and idle workers go on for a minute. So whoever starts next in the same place ends them: a
lock on a file in the directory says whether its owner lives, and what has a file open in there was his, unless its
session has a leader: then it is somebody's who reads the logs, or its warden's, who lives and is at it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import structlog

from service.cluster.warden import processes

SWEEP_S = 5.0
"""How long processes without an owner may take to end once they are killed, in seconds."""

_LOCK = "owner"
_SOCKET_PATH_BYTES = 107
"""Longest path of a Unix socket, without the final NUL."""
_RAY_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1"
"""The longest of what Ray puts below its directory."""

log = structlog.get_logger(__name__)


@contextlib.contextmanager
def fleet_directory(wanted: Path | None) -> Iterator[Path]:
    """A new directory for one fleet, removed at the end; what was left beside it by the dead is removed first.

    It lies below ``wanted`` or the system's directory for such things, and is short enough for Ray's sockets.
    """
    parent = _parent(wanted)
    _sweep(parent)
    directory = Path(tempfile.mkdtemp(prefix="fleet-", dir=parent))
    lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.write(lock, f"{os.getpid()}\n".encode())  # from now on: an empty one may be locked in a moment
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _parent(wanted: Path | None) -> Path:
    for parent in (wanted, Path(tempfile.gettempdir())):
        name = "/fleet-12345678/ray" + _RAY_SOCKET
        if parent is not None and len(os.fsencode(parent.absolute())) + len(name) <= _SOCKET_PATH_BYTES:
            parent.mkdir(parents=True, exist_ok=True)
            return parent.absolute()
    return Path("/tmp")  # noqa: S108 - all that is left


def _sweep(parent: Path) -> None:
    """End what runs in the directories of fleets without an owner, and remove them."""
    for directory in parent.glob("fleet-*"):
        try:
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:  # it was removed, or is somebody else's
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.read(lock, 1):
                left = _end_all_in(directory)
                log.warning("a fleet without an owner was removed", directory=str(directory), processes=left)
                shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            continue  # its owner lives
        finally:
            os.close(lock)


def _end_all_in(directory: Path) -> int:
    """Kill every process of a fleet without a warden that has a file open below a directory; how many there were."""
    deadline, killed = time.monotonic() + SWEEP_S, set[int]()
    while (found := set(_users_of(directory))) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed |= found
        time.sleep(0.02)
    return len(killed)


def _users_of(directory: Path) -> Iterator[int]:
    """Processes whose session has lost its leader, with a file open below a directory.

    The lock does not count: who looks whether its owner lives has that open, and may be without a leader himself.
    Session 0 is the one of whoever was put into a container from outside: its leader cannot be seen from here.
    """
    beginning = f"{directory.resolve()}/"
    lock = beginning + _LOCK
    running = list(processes())
    leaders = {0, *(process.pid for process in running)}
    for process in running:
        if process.session not in leaders:
            with contextlib.suppress(OSError):  # it has ended, or is somebody else's
                links = (os.readlink(each) for each in Path(f"/proc/{process.pid}/fd").iterdir())  # noqa: PTH115
                if any(link.startswith(beginning) and link != lock for link in links):
                    yield process.pid
