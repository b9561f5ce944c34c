"""Which processes of a cluster make the parts of a job, and when: a driver that has each batch noted by its maker."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from service.cluster.driver import Capacity, Driver, TaskRequest
from workers import entry
from workers.errors import MergemillError

PATIENCE_S = 60.0
"""How long a process waits for the others."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Tasks of one stream that a process was given together."""

    pid: int
    """The process."""
    began: float
    """When it began with them."""
    ended: float
    """When it was done with all of them."""
    parts: int
    """Parts among them."""
    surveys: int
    """Survey tasks among them."""


class Witness:
    """A :class:`service.cluster.driver.Driver` on this machine whose parts are made by so many processes at once.

    Tasks go out in streams, as they always do. No process begins with its first batch of parts before the others are
    there with theirs: without that, one that is quick leaves nothing to one that is still starting.
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

    def seen(self) -> list[Batch]:
        """Every batch that was done."""
        return [Batch(**json.loads(note.read_text())) for note in self._directory.glob("*.done")]

    def at_once(self) -> int:
        """The most processes that made parts at the same time."""
        made = [batch for batch in self.seen() if batch.parts]
        return max(
            (
                len({batch.pid for batch in made if batch.began <= moment < batch.ended})
                for moment in (batch.began for batch in made)
            ),
            default=0,
        )

    @property
    def known_capacity(self) -> Capacity | None:
        """As the driver's."""
        return self._driver.known_capacity

    def submit(self, request: TaskRequest) -> Future[Any]:
        """As the driver's, noted."""
        witness = {"directory": str(self._directory), "processes": self._processes}
        payload = {**request.payload, "witness": witness}
        return self._driver.submit(replace(request, entry=f"{__name__}:tasks", payload=payload))

    def cancel(self, future: Future[Any]) -> bool:
        """As the driver's."""
        return self._driver.cancel(future)

    def capacity(self, timeout_s: float | None = None) -> Capacity:
        """As the driver's."""
        return self._driver.capacity(timeout_s)


def tasks(payloads: Sequence[Any]) -> Iterator[tuple[int, Any | MergemillError]]:
    """What the workers call in place of :func:`workers.entry.tasks`: the same, and a note."""
    directory = Path(payloads[0]["witness"]["directory"])
    parts = sum("part" in payload for payload in payloads)
    # With a survey in it a batch waits for nobody: others may have no parts before they know what it finds.
    alone = parts < len(payloads)
    began = time.time() if alone else _together(directory, payloads[0]["witness"]["processes"])
    yield from entry.tasks(payloads)
    # Before the last answer is told: whoever has it finds the note.
    note = Batch(os.getpid(), began, time.time(), parts, len(payloads) - parts)
    (directory / f"{uuid.uuid4().hex}.done").write_text(json.dumps(asdict(note)))


def _together(directory: Path, processes: int) -> float:
    """Wait until so many processes are here; when this one begins.

    :raises TimeoutError: they do not come.
    """
    mine = directory / f"{os.getpid()}.here"
    is_first = not mine.exists()
    if is_first:
        mine.touch()
    deadline = time.monotonic() + PATIENCE_S
    while len(list(directory.glob("*.here"))) < processes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"there are not {processes} processes that make parts")
        time.sleep(0.005)
    # All begin at once, with the arrival of the last: who is done before another has seen that was still beside it.
    arrivals = [here.stat().st_ctime for here in directory.glob("*.here")]
    return max(arrivals) if is_first else time.time()
