"""Which processes of a cluster make the parts of a job, and when: a driver that has each part noted by its maker."""

from __future__ import annotations

import json
import os
import time
import uuid
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from service.driver import Capacity, Driver, TaskRequest
from workers import entry
from workers.errors import MergemillError

PATIENCE_S = 60.0
"""How long a process waits for the others."""


class Witness:
    """A :class:`service.driver.Driver` on this machine whose parts are made by so many processes at once.

    No process begins with its first part before the others are there with theirs: without that, one that is
    quick leaves nothing to one that is still starting.
    """

    def __init__(self, driver: Driver, processes: int, directory: Path) -> None:
        self._driver = driver
        self._processes = processes
        self._root = directory
        self.begin()

    def begin(self) -> None:
        """Forget what was seen: the next job begins."""
        self._directory = self._root / uuid.uuid4().hex
        self._directory.mkdir(parents=True)

    def seen(self) -> list[tuple[float, float, int]]:
        """Every part that was made: when it was begun and ended, and by which process."""
        notes = [json.loads(note.read_text()) for note in self._directory.glob("*.made")]
        return [(note["began"], note["ended"], note["pid"]) for note in notes]

    def at_once(self) -> int:
        """The most processes that were at work at the same time."""
        seen = self.seen()
        return max(
            (len({pid for began, ended, pid in seen if began <= moment < ended}) for moment, _, _ in seen),
            default=0,
        )

    def submit(self, request: TaskRequest) -> Future[Any]:
        """As the driver's, with parts noted."""
        if "part" in request.payload:
            witness = {"directory": str(self._directory), "processes": self._processes}
            payload = {**request.payload, "witness": witness}
            # One by one: a stream may hold several parts, and none would be left for a process that waits.
            request = replace(request, entry=f"{__name__}:part", payload=payload, stream=None)
        return self._driver.submit(request)

    def cancel(self, future: Future[Any]) -> bool:
        """As the driver's."""
        return self._driver.cancel(future)

    def capacity(self, timeout_s: float | None = None) -> Capacity:
        """As the driver's."""
        return self._driver.capacity(timeout_s)


def part(payload: dict[str, Any]) -> Any:
    """What the workers call in place of :func:`workers.entry.tasks`: a stream of one part, and a note."""
    directory, pid = Path(payload["witness"]["directory"]), os.getpid()
    mine = directory / f"{pid}.here"
    is_first = not mine.exists()
    mine.touch(exist_ok=True)
    deadline = time.monotonic() + PATIENCE_S
    while len(list(directory.glob("*.here"))) < payload["witness"]["processes"]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"there are not {payload['witness']['processes']} processes that make parts")
        time.sleep(0.005)
    # All begin at once, with the arrival of the last: who is done before another has seen that was still beside it.
    arrivals = [here.stat().st_ctime for here in directory.glob("*.here")]
    began = max(arrivals) if is_first else time.time()
    ((_, answer),) = entry.tasks([payload])
    note = {"pid": pid, "began": began, "ended": time.time()}
    (directory / f"{uuid.uuid4().hex}.made").write_text(json.dumps(note))
    if isinstance(answer, MergemillError):
        raise answer
    return answer
