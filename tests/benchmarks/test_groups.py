"""CPU time and memory of groups of processes: what the kernel writes is read right, and nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import groups
from benchmarks.groups import (
    Entry,
    Group,
    Tree,
    Watch,
    family,
    hierarchy,
    parse_stat,
    parse_status,
    usage_seconds,
)

fast = pytest.mark.fast

STAT = "42 (a) b (c)) S 7 42 42 0 -1 4194304 100 200 0 0 250 50 9 8 20 0 4 0 777 1000 10 18446744073709551615"


@fast
def test_a_process_may_be_called_anything() -> None:
    assert parse_stat(STAT) == Entry(parent=7, born=777, ticks=300)


@fast
def test_status_in_bytes_and_of_a_zombie() -> None:
    text = "Name:\tx\nVmHWM:\t  900 kB\nVmRSS:\t 800 kB\nRssAnon:\t 500 kB\nRssFile:\t 200 kB\nRssShmem:\t 100 kB\n"
    found = parse_status(text, is_worker=True)
    assert (found.own, found.peak, found.is_worker) == (600 * 1024, 900 * 1024, True)
    assert parse_status("Name:\tx\nState:\tZ\n", is_worker=False).peak == 0


@fast
def test_usage_of_a_control_group() -> None:
    assert usage_seconds("usage_usec 2500000\nuser_usec 1\nsystem_usec 2\n") == 2.5


@fast
@pytest.mark.parametrize(
    ("mounts", "own", "expected"),
    [
        ("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n", "0::/user.slice/a b\n", "/sys/fs/cgroup/user.slice/a b"),
        (
            "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\nx /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
            "2:cpu:/job\n0::/\n",
            "/sys/fs/cgroup/unified/",
        ),
        ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", "2:cpu:/job\n", None),
        ("proc /proc proc rw 0 0\n", "0::/\n", None),
    ],
)
def test_where_our_group_is(mounts: str, own: str, expected: str | None) -> None:
    found = hierarchy(mounts, own)
    assert found == (None if expected is None else Path(expected))


@fast
def test_a_family_keeps_orphans_and_leaves_strangers_and_reused_ids() -> None:
    known = {10: Entry(1, 100, 0), 11: Entry(10, 110, 0), 12: Entry(10, 120, 0)}
    table = {
        1: Entry(0, 1, 9),
        11: Entry(1, 110, 5),  # its parent, 10, is gone
        12: Entry(1, 999, 5),  # another process with an old id
        20: Entry(11, 130, 5),
        21: Entry(20, 140, 5),
        30: Entry(1, 150, 5),
    }
    assert set(family(table, known)) == {11, 20, 21}


def _spin(seconds: float) -> list[str]:
    """A program that burns CPU in a child of a child, and ends only then."""
    burn = f"import time\nwhile time.process_time() < {seconds}: pass"
    nest = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}], check=True)"
    return [sys.executable, "-S", "-c", nest]


@pytest.fixture(params=["control group", "tree"])
def fresh(request: pytest.FixtureRequest) -> Iterator[Group]:
    """An empty group of each kind that this machine can make."""
    if request.param == "tree":
        yield (made := Tree())
        made.close()
        return
    with groups.group(f"test-{os.getpid()}") as found:
        if not found.exact:
            pytest.skip("no control group can be made here")
        yield found


def test_a_group_counts_processes_that_have_ended(fresh: Group) -> None:
    with Watch(fresh) as watch:
        running = subprocess.Popen(fresh.command(_spin(1.0)))
        fresh.adopt(running.pid)
        assert running.wait() == 0
    least = 1.0 if fresh.exact else 1.0 - 2 * groups.SAMPLE_S  # what a tree misses since its last look
    assert watch.cpu_s >= least * 0.9
    assert watch.process_peak_bytes > 1 << 20
    assert watch.own_peak_bytes > 0
    assert watch.worker_peak_bytes == 0
    assert fresh.pids() == set()


def test_a_group_leaves_nobody_behind(fresh: Group) -> None:
    running = subprocess.Popen(fresh.command([sys.executable, "-S", "-c", "import signal; signal.pause()"]))
    fresh.adopt(running.pid)
    assert running.pid in fresh.pids()
    if isinstance(fresh, Tree):
        fresh.close()
    else:
        groups._kill(fresh.pids())
    assert running.wait(20) == -9
