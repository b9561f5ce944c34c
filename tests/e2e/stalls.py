"""A store that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from workers.store.base import ObjectStore


class Stalling:
    """A store whose ``method`` does not answer, from a moment on, until :meth:`go_on`; then it acts all the same.

    :param on_stall: called when the first call has stalled.
    """

    def __init__(self, store: ObjectStore, method: str, on_stall: Callable[[], None]) -> None:
        self._store = store
        self._method = method
        self._on_stall = on_stall
        self._going = threading.Event()
        self._stalled = threading.Event()
        self._left = threading.Semaphore(0)
        self.calls = 0
        """How many have stalled."""

    def go_on(self) -> None:
        """Answer, and act, at last; returns when every stalled call has."""
        self._going.set()
        for _ in range(self.calls):
            assert self._left.acquire(timeout=30)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name != self._method or self._going.is_set():
            return method

        def stall(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if not self._stalled.is_set():
                self._stalled.set()
                self._on_stall()
            assert self._going.wait(60)
            try:
                return method(*args, **kwargs)
            finally:
                self._left.release()

        return stall
