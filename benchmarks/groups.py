"""Groups of processes, and what they use: CPU time and memory of everything that one contender starts.

A control group is exact: the kernel adds up every process in it, dead ones included, and nothing leaves it.
Where none can be made (it takes root, or a delegated one) the process table is looked at five times a second:
what a process used since the last look before it ended is then lost.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

SAMPLE_S = 0.2
"""Time between two looks at memory, in seconds."""

CLOSE_TIMEOUT_S = 30.0
"""Longest wait for killed processes to be gone, in seconds."""

WORKER = b"ray::"
"""What the command line of a worker of ours begins with."""

_TICKS = os.sysconf("SC_CLK_TCK")
_RESET_PEAK = "5"
_ENTER = 'echo $$ > "$0" && exec "$@"'


class Group(Protocol):
    """Processes of one contender, and their descendants."""

    exact: bool
    """Whether the CPU time is the kernel's own sum."""

    def command(self, argv: Sequence[str]) -> list[str]:
        """``argv`` such that it runs in the group from its first instruction."""
        ...

    def adopt(self, pid: int) -> None:
        """Count a process that runs already, and what it starts from now on."""
        ...

    def pids(self) -> set[int]:
        """Who is in it now."""
        ...

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        ...

    def close(self) -> None:
        """Kill who is left."""
        ...


class ControlGroup:
    """A version 2 control group; it needs no controller, every group counts CPU time."""

    exact = True

    def __init__(self, parent: Path, name: str) -> None:
        self._path = parent / f"mergemill-bench-{os.getpid()}-{name}"
        self._path.mkdir()

    def command(self, argv: Sequence[str]) -> list[str]:
        """See :meth:`Group.command`."""
        return ["/bin/sh", "-c", _ENTER, str(self._path / "cgroup.procs"), *argv]

    def adopt(self, pid: int) -> None:
        """See :meth:`Group.adopt`."""
        with contextlib.suppress(ProcessLookupError):  # it was short
            (self._path / "cgroup.procs").write_text(str(pid))

    def pids(self) -> set[int]:
        """See :meth:`Group.pids`."""
        return set(map(int, (self._path / "cgroup.procs").read_text().split()))

    def cpu_seconds(self) -> float:
        """See :meth:`Group.cpu_seconds`."""
        return usage_seconds((self._path / "cpu.stat").read_text())

    def close(self) -> None:
        """See :meth:`Group.close`."""
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while True:
            _kill(self.pids())
            try:
                self._path.rmdir()
                return
            except OSError:  # busy: the killed are still going
                if time.monotonic() > deadline:
                    raise
            time.sleep(SAMPLE_S / 10)


class Tree:
    """The descendants of some processes, as the process table shows them now and then."""

    exact = False

    def __init__(self) -> None:
        self._known: dict[int, Entry] = {}
        self._lock = threading.Lock()
        self._used: dict[tuple[int, int], int] = {}

    def command(self, argv: Sequence[str]) -> list[str]:
        """See :meth:`Group.command`; who starts it has to :meth:`adopt` it."""
        return list(argv)

    def adopt(self, pid: int) -> None:
        """See :meth:`Group.adopt`."""
        table = process_table()
        with self._lock:
            if pid in table:
                self._known[pid] = table[pid]

    def pids(self) -> set[int]:
        """See :meth:`Group.pids`."""
        with self._lock:
            self._known = family(process_table(), self._known)
            for pid, entry in self._known.items():
                self._used[pid, entry.born] = entry.ticks
            return set(self._known)

    def cpu_seconds(self) -> float:
        """See :meth:`Group.cpu_seconds`."""
        self.pids()
        return sum(self._used.values()) / _TICKS

    def close(self) -> None:
        """See :meth:`Group.close`."""
        _kill(self.pids())


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the process table."""

    parent: int
    """Process id of the parent."""
    born: int
    """When it was started, in ticks since the machine was; with its id this names a process for good."""
    ticks: int
    """CPU time of its own, user and system."""


def family(table: Mapping[int, Entry], known: Mapping[int, Entry]) -> dict[int, Entry]:
    """Those of ``known`` that still run, and all their descendants, as they are now."""
    found = {pid: table[pid] for pid, old in known.items() if pid in table and table[pid].born == old.born}
    children: dict[int, list[int]] = {}
    for pid, entry in table.items():
        children.setdefault(entry.parent, []).append(pid)
    new = list(found)
    while new:
        for pid in children.get(new.pop(), []):
            if pid not in found:
                found[pid] = table[pid]
                new.append(pid)
    return found


def process_table() -> dict[int, Entry]:
    """All processes."""
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended since
                found[int(directory.name)] = parse_stat((directory / "stat").read_text(errors="replace"))
    return found


def parse_stat(text: str) -> Entry:
    """``/proc/<pid>/stat``; the name in it may hold spaces and brackets."""
    fields = text.rpartition(")")[2].split()
    return Entry(parent=int(fields[1]), born=int(fields[19]), ticks=int(fields[11]) + int(fields[12]))


def usage_seconds(text: str) -> float:
    """``cpu.stat`` of a version 2 control group: its CPU seconds."""
    values = dict(line.split() for line in text.splitlines())
    return int(values["usage_usec"]) / 1e6


def hierarchy(mounts: str, own: str) -> Path | None:
    """Where our version 2 control group is, from ``/proc/mounts`` and ``/proc/self/cgroup``."""
    roots = [line.split()[1] for line in mounts.splitlines() if line.split()[2] == "cgroup2"]
    paths = [line[3:] for line in own.splitlines() if line.startswith("0::")]
    return Path(roots[0] + paths[0]) if roots and paths else None


@contextlib.contextmanager
def group(name: str) -> Iterator[Group]:
    """A new, empty group; who is in it at the end is killed."""
    made: Group
    parent = hierarchy(Path("/proc/mounts").read_text(), Path("/proc/self/cgroup").read_text())
    try:
        if parent is None:
            raise FileNotFoundError("no version 2 control groups")
        made = ControlGroup(parent, name)
    except OSError:
        made = Tree()
    try:
        yield made
    finally:
        made.close()


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of one process, in bytes."""

    own: int
    """Anonymous and shared pages: what nobody can take away from it. Mapped files do not count."""
    peak: int
    """VmHWM: the most that was ever resident since it was last reset, mapped files included."""
    is_worker: bool
    """Whether it is a worker of ours."""


class Watch:
    """What a group uses in a ``with`` block; the attributes are there after it."""

    def __init__(self, watched: Group) -> None:
        self._group = watched
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="watch", daemon=True)
        self._peaks: dict[tuple[int, bool], int] = {}
        self.cpu_s = 0.0
        """CPU seconds."""
        self.own_peak_bytes = 0
        """Most anonymous and shared memory of all processes together, at the moments that were looked at."""

    def __enter__(self) -> Self:
        for pid in self._group.pids():
            with contextlib.suppress(OSError):  # else its peak is that of its life
                Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)
        self._before = self._group.cpu_seconds()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.cpu_s = self._group.cpu_seconds() - self._before

    @property
    def process_peak_bytes(self) -> int:
        """VmHWM of the biggest process."""
        return max(self._peaks.values(), default=0)

    @property
    def worker_peak_bytes(self) -> int:
        """VmHWM of the biggest worker of ours; 0 when there was none."""
        return max((peak for (_, is_worker), peak in self._peaks.items() if is_worker), default=0)

    def _sample(self) -> None:
        while True:
            last = self._stop.is_set()
            self._look()
            if last:
                return
            self._stop.wait(SAMPLE_S)

    def _look(self) -> None:
        together = 0
        for pid in self._group.pids():
            with contextlib.suppress(OSError):  # it has ended since
                found = memory(pid)
                together += found.own
                key = pid, found.is_worker
                self._peaks[key] = max(found.peak, self._peaks.get(key, 0))
        self.own_peak_bytes = max(self.own_peak_bytes, together)


def memory(pid: int) -> Memory:
    """What a process holds now.

    :raises OSError: it has ended.
    """
    directory = Path(f"/proc/{pid}")
    name = (directory / "cmdline").read_bytes()
    return parse_status((directory / "status").read_text(errors="replace"), name.startswith(WORKER))


def parse_status(text: str, is_worker: bool) -> Memory:
    """``/proc/<pid>/status``; a kernel thread and a zombie hold nothing."""
    values = {
        line.partition(":")[0]: int(line.split()[1]) * 1024
        for line in text.splitlines()
        if line.startswith(("RssAnon:", "RssShmem:", "VmHWM:"))
    }
    own = values.get("RssAnon", 0) + values.get("RssShmem", 0)
    return Memory(own, values.get("VmHWM", 0), is_worker)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
