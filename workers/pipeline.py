"""Several items on their way through the same stages at once, each stage in a thread of its own.

While one part is merged, the next is being read and the last one uploaded. Knows nothing of what the stages do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")

Outcome = tuple[int, Exception | None]
"""An item's number, and why it failed if it did."""

_Queue = queue.Queue[Outcome | None]


class StoppedError(Exception):
    """The pipeline was stopped before this item was through."""


class Pipeline(Generic[T]):
    """Takes items through stages. A stage has one item in hand at a time, in the order that they came."""

    def __init__(
        self, stages: Mapping[str, Callable[[T], None]], finish: Callable[[T], None], waiting: int = 1
    ) -> None:
        """
        :param stages: functions by name, in order. Each takes an item one step further, in place; what it raises is
            the item's outcome, and the later stages do not see it.
        :param finish: called once for each item, whatever became of it: releases what it holds.
        :param waiting: items that may wait before each stage but the first.
        """
        self._stages = stages
        self._finish = finish
        self._waiting = waiting

    def run(self, items: Sequence[T]) -> Generator[Outcome]:
        """Each item's outcome as soon as it is through. Closing the iterator ends the rest with the stage that
        they are in, and waits for that."""
        stopped = threading.Event()
        queues = [_Queue(), *(_Queue(self._waiting) for _ in list(self._stages)[1:]), _Queue()]
        for number in range(len(items)):
            queues[0].put((number, None))
        queues[0].put(None)

        def serve(stage: Callable[[T], None], source: _Queue, sink: _Queue) -> None:
            for number, failure in iter(source.get, None):
                error = failure or (StoppedError() if stopped.is_set() else None)
                if error is None:
                    try:
                        stage(items[number])
                    except Exception as raised:  # noqa: BLE001 - it is this item's outcome, and no other's
                        error = raised
                if sink is queues[-1]:
                    try:
                        self._finish(items[number])
                    except Exception as raised:  # noqa: BLE001 - told as well: who waits must not wait for ever
                        error = error or raised
                sink.put((number, error))
                del failure, error  # its traceback holds this frame, and so what the item holds
            sink.put(None)

        with _threads(
            threading.Thread(target=serve, args=(stage, source, sink), name=name, daemon=True)
            for (name, stage), source, sink in zip(self._stages.items(), queues, queues[1:], strict=False)
        ):
            try:
                yield from iter(queues[-1].get, None)
            finally:
                stopped.set()


@contextmanager
def _threads(threads: Iterator[threading.Thread]) -> Iterator[None]:
    started = []
    for thread in threads:
        thread.start()
        started.append(thread)
    try:
        yield
    finally:
        for thread in started:
            thread.join()
