"""Whose a connection is: the processes of this machine, seen from outside."""

from __future__ import annotations

import contextlib
from pathlib import Path

from service.cluster.warden import processes


def owner_of(port: int) -> int:
    """The process on this machine that has a TCP socket with this local port; 0 when there is none."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in processes():
        with contextlib.suppress(OSError):  # it ended meanwhile, or is not ours
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) in inodes:
                        return process.pid
    return 0


def ancestors(pid: int) -> list[int]:
    """The process and those above it."""
    parents = {process.pid: process.parent for process in processes()}
    found = []
    while pid in parents:
        found.append(pid)
        pid = parents[pid]
    return found
