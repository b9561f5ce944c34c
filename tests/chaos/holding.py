"""How a scheduler is made to stop itself at a step of its own, and what it did under its leases."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

_LOOK_S: Final = 0.02


class Hold:
    """A file that tells schedulers at which change of a commit to stop; whoever comes there first takes it.

    ``watch/sitecustomize.py`` is the other side.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        """The file."""
        self._taken = path.with_suffix(".taken")

    def ask(self, step: int) -> None:
        """Have the first process stop that comes to this change of a commit, from 0."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(str(step))
        fresh.replace(self.path)

    def taken(self) -> int | None:
        """Id of the process that has stopped, or is about to."""
        try:
            return int(self._taken.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def withdraw(self) -> None:
        """Nobody is to stop any more."""
        self.path.unlink(missing_ok=True)


def resume(pid: int) -> None:
    """Let a process go on, if it is still there."""
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return  # something else killed it meanwhile


def wait(until: float) -> None:
    """Wait a moment, but not beyond this one of the steady clock."""
    time.sleep(max(0.0, min(_LOOK_S, until - time.monotonic())))


def notes(path: Path) -> list[Mapping[str, Any]]:
    """The lines of a file of JSON; one that was cut short by a kill is none."""
    if not path.exists():
        return []
    return list(_whole(path.read_text().splitlines()))


def _whole(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def came_back(found: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """No lease came back: after something was done under another one, nothing is done under the one before.

    What was refused is not among these. Two things are in order only if one had ended before the other began.

    :param found: ``job``, ``token``, ``what``, ``began`` and ``ended`` of all that was done.
    """
    of_job: dict[str, list[Mapping[str, Any]]] = {}
    for each in found:
        of_job.setdefault(each["job"], []).append(each)
    for job, own in of_job.items():
        first_end: dict[str, float] = {}
        for each in own:
            token = each["token"]
            first_end[token] = min(each["ended"], first_end.get(token, each["ended"]))
        for each in sorted(own, key=lambda each: each["began"]):
            since = first_end[each["token"]]
            between = (
                other
                for other in own
                if other["token"] != each["token"]
                and since <= other["began"]
                and other["ended"] <= each["began"]
            )
            if (other := next(between, None)) is not None:
                yield f"{job}: {each['what']} under {each['token']} after {other['what']} under {other['token']}"
                break
