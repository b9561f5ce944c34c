"""A device that takes its time: work waits on its lane, and lanes go on in any order that nobody forbade."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from workers.kernels.conveyor import Lanes
from workers.kernels.moves import Lane


class LateLanes(Lanes):
    """Does nothing before it is waited for; then one thing at a time from a lane drawn at random.

    It keeps each lane's own order and what ``after`` says, and nothing else: as streams and events do.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._waiting: dict[Lane, list[tuple[int, Callable[[], None], Sequence[object]]]] = {}
        self._done: set[object] = set()
        self._asked = 0

    def run(self, lane: Lane, work: Callable[[], None], after: Sequence[object] = ()) -> object:
        """See :meth:`Lanes.run`."""
        self._asked += 1
        self._waiting.setdefault(lane, []).append((self._asked, work, after))
        return self._asked

    def join(self) -> None:
        """See :meth:`Lanes.join`."""
        while any(self._waiting.values()):
            ready = [
                lane
                for lane, queue in self._waiting.items()
                if queue and all(end in self._done for end in queue[0][2])
            ]
            number, work, _ = self._waiting[self._random.choice(ready)].pop(0)
            work()
            self._done.add(number)
