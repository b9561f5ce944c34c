"""The directory of a fleet: short, locked, and swept of what the dead have left by whoever comes next."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.cluster.fleet_directory import fleet_directory
from service.cluster.warden import processes
from tests.processes import running


@pytest.mark.parametrize("depth", [1, 60])
def test_it_is_short_enough_for_rays_sockets(depth: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        wanted = Path(parent, *["d"] * depth)
        with fleet_directory(wanted) as made:
            assert made.is_relative_to(wanted) == (depth == 1)
            socket = made / "ray/session_2026-11-22_06-11-34_735910_4194304/sockets/plasma_store.1"
            assert len(str(socket)) <= 107
        assert not made.exists()


OWNER = """
import signal, subprocess, sys
from pathlib import Path
from service.cluster.fleet_directory import fleet_directory
with fleet_directory(Path(sys.argv[1])) as made:
    sleep = "echo here >&2; sleep 60 & sleep 60"
    log = (made / "log").open("w")
    below = subprocess.Popen(["setsid", "sh", "-c", sleep], stdout=log, stderr=subprocess.PIPE)
    below.stderr.readline()
    print(made, below.pid, flush=True)
    signal.pause()
"""
"""Has a fleet of two processes in a session of their own, which they lead."""


@contextmanager
def owner(parent: Path) -> Iterator[tuple[subprocess.Popen[str], Path, int]]:
    """The owner of a directory below ``parent``, and the leader of its fleet's session."""
    with running([sys.executable, "-c", OWNER, parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        made, leader = process.stdout.readline().split()
        try:
            yield process, Path(made), int(leader)
        finally:
            process.kill()
            for pid in session(int(leader)):
                os.kill(pid, 9)


def session(leader: int) -> list[int]:
    return [process.pid for process in processes() if process.session == leader]


def without_leader(leader: int) -> None:
    """Kill the leader of a session, and wait until it has ended."""
    os.kill(leader, 9)
    while leader in session(leader):
        time.sleep(0.01)


def test_what_runs_for_an_owner_that_was_killed_with_its_warden_is_ended_by_the_next() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent, owner(Path(parent)) as (process, made, leader):
        process.kill()
        process.wait()
        without_leader(leader)  # as a warden that is killed: those in its session go on
        assert session(leader)
        with fleet_directory(Path(parent)):
            assert not session(leader)
            assert not made.exists()


def test_the_fleet_of_an_owner_that_lives_is_left_alone() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent, owner(Path(parent)) as (_, made, leader):
        before = session(leader)
        with fleet_directory(Path(parent)):
            assert {*before} <= {*session(leader)}  # its leader may be about to start the others
            assert made.exists()


def test_who_reads_the_logs_of_the_dead_is_left_alone() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent, owner(Path(parent)) as (process, made, leader):
        process.kill()
        process.wait()
        reader = ["tail", "-f", str(made / "log")]
        with running(reader, start_new_session=True) as tail:
            without_leader(leader)
            with fleet_directory(Path(parent)):
                assert not session(leader)
                assert tail.poll() is None
            tail.kill()


SWEEPER = """
import os, sys, time
from pathlib import Path
from service.cluster.fleet_directory import fleet_directory
leader = os.getsid(0)
while Path(f"/proc/{leader}/stat").exists() and " Z " not in Path(f"/proc/{leader}/stat").read_text():
    time.sleep(0.01)
with fleet_directory(Path(sys.argv[1])):
    print("swept", flush=True)
"""
"""Sweeps once the leader of its own session has ended."""


def test_who_sweeps_may_be_without_a_leader_himself() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent, owner(Path(parent)) as (process, made, leader):
        process.kill()
        process.wait()
        without_leader(leader)
        shell = ["setsid", "sh", "-c", '"$@" &', "sh", sys.executable, "-c", SWEEPER, parent]
        done = subprocess.run(shell, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
        assert done.stdout.endswith("swept\n")
        assert not session(leader)
        assert not made.exists()


def test_a_directory_that_nobody_owns_yet_is_left_alone() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        made = Path(parent, "fleet-new")
        made.mkdir()
        with fleet_directory(Path(parent)):
            assert made.exists()
        (made / "owner").touch()
        with fleet_directory(Path(parent)):
            assert made.exists()
