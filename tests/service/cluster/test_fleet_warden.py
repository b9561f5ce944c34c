"""The warden: nothing of a command is left, however it, the warden's parent or the warden ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from service.cluster.warden import kill_session, processes
from tests.processes import running
from tests.waiting import until

WARDEN = [sys.executable, "-m", "service.cluster.warden"]
LITTER = "(setsid sleep 60 & sleep 60 & (sleep 60 &));"
"""Leaves children, orphans, and a process in a session of its own."""


def start(script: str) -> AbstractContextManager[subprocess.Popen[str]]:
    command = [*WARDEN, os.getpid(), "--", "sh", "-c", script]
    return running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def descendants(pid: int) -> set[int]:
    table = list(processes())
    found, added = {pid}, True
    while added:
        more = {its.pid for its in table if its.parent in found} - found
        found |= more
        added = bool(more)
    return found - {pid}


def alive(pids: set[int]) -> set[int]:
    return pids & {its.pid for its in processes()}


wait_until = partial(until, seconds=20)


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_exit_status_is_the_commands(script: str, status: int) -> None:
    with start(script) as warden:
        assert warden.wait(20) == status


def test_litter_goes_when_the_command_ends() -> None:
    with start(f"{LITTER} echo ready; read line; exit 3") as warden:
        assert warden.stdout is not None
        assert warden.stdin is not None
        assert warden.stdout.readline() == "ready\n"
        wait_until(lambda: len(descendants(warden.pid)) >= 4)
        litter = descendants(warden.pid)
        warden.stdin.write("\n")
        warden.stdin.flush()
        assert warden.wait(20) == 3
        assert not alive(litter)


def test_sigterm_ends_all_of_it() -> None:
    with start(f"trap '' TERM; {LITTER} echo ready; sleep 60") as warden:
        assert warden.stdout is not None
        assert warden.stdout.readline() == "ready\n"
        wait_until(lambda: len(descendants(warden.pid)) >= 4)
        below = descendants(warden.pid)
        warden.terminate()
        assert warden.wait(20) == 143
        assert not alive(below)


def test_the_death_of_its_parent_ends_all_of_it(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "sockets").mkdir(parents=True)
    arguments = ["--scratch", str(scratch), "--", "sh", "-c", LITTER + " echo ready; sleep 60"]
    script = (
        "import os, signal, subprocess\n"
        f"command = {WARDEN!r} + [str(os.getpid())] + {arguments!r}\n"
        "print(subprocess.Popen(command, start_new_session=True).pid, flush=True)\n"
        "signal.pause()\n"
    )
    with running([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline(), parent.stdout.readline()}  # by two processes, in either order
        (pid,) = said - {"ready\n"}
        warden = int(pid)
        wait_until(lambda: len(descendants(warden)) >= 4)
        below = descendants(warden)
        parent.kill()
        wait_until(lambda: not alive(below | {warden}))
        assert not scratch.exists()


def test_a_parent_that_was_gone_before_it_looked_is_noticed() -> None:
    with running([*WARDEN, "1", "--", "sleep", "60"], start_new_session=True) as warden:
        assert warden.wait(20) == 143


def test_the_session_of_a_killed_warden_can_be_swept() -> None:
    with start("(sleep 60 & sleep 60 &); echo ready; sleep 60") as warden:
        assert warden.stdout is not None
        assert warden.stdout.readline() == "ready\n"
        wait_until(lambda: len(descendants(warden.pid)) >= 3)
        below = descendants(warden.pid)
        os.kill(warden.pid, signal.SIGKILL)
        warden.wait(20)
        assert alive(below)
        assert kill_session(warden.pid)
        assert not alive(below)
