"""A store whose calls are not waited for any longer than there is reason to.

A call to an object store cannot be broken off, and one that stalls lasts for as long as the store's client has
patience: minutes. So calls are made in threads of their own, and whoever made one goes away from it when he is told
to. The call goes on, and a change may thus be made after its maker went: :meth:`Interruptible.settle` tells.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import copy_context
from itertools import islice
from typing import Any, Final, TypeVar, cast

from workers.store.base import ObjectInfo, ObjectStore

LOOK_S: Final = 0.25
"""How often it is asked whether a call is still worth waiting for, in seconds."""

LISTED: Final = 1000
"""Objects of a listing that are fetched at once: a page of S3's."""

CHANGES: Final = frozenset(
    {
        "put",
        "put_if_absent",
        "delete",
        "open_upload",
        "put_part",
        "copy_part",
        "complete",
        "abort",
        "check_writable",
    }
)
"""Methods after which the store is not what it was, if only for a moment."""

T = TypeVar("T")


class Interruptible:
    """What makes an :class:`ObjectStore` interruptible. Safe to share between threads.

    :param look: asked before every call and now and then during it, with the seconds that it has lasted; what it
        raises is raised in place of an answer.
    """

    def __init__(self, store: ObjectStore, look: Callable[[float], None]) -> None:
        self._target = store
        self._look = look
        self._changing: set[Future[Any]] = set()
        self._lock = threading.Lock()

    @property
    def store(self) -> ObjectStore:
        """The store, interruptible."""
        return cast(ObjectStore, self)

    def settle(self, timeout_s: float) -> bool:
        """Wait for changes that were gone away from; whether all have come to their end."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            changing = list(self._changing)
        for future in changing:
            try:
                future.exception(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return False
        return True

    def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
        """See :meth:`ObjectStore.list`."""
        found = self._target.list(prefix, beside=beside)
        while page := self._call("list", lambda: list(islice(found, LISTED))):
            yield from page

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._target, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call(name, lambda: method(*args, **kwargs))

        return call

    def _call(self, name: str, act: Callable[[], T]) -> T:
        self._look(0.0)
        future: Future[T] = Future()
        if name in CHANGES:
            with self._lock:
                self._changing.add(future)
            future.add_done_callback(self._changed)
        began, context = time.monotonic(), copy_context()
        # Daemons: nothing that is stalled may keep a process from ending.
        thread = threading.Thread(
            target=context.run, args=(_do, act, future), name=f"store {name}", daemon=True
        )
        thread.start()
        while True:
            try:
                return future.result(LOOK_S)
            except TimeoutError:
                if future.done():  # the store's own
                    raise
                self._look(time.monotonic() - began)

    def _changed(self, future: Future[Any]) -> None:
        with self._lock:
            self._changing.discard(future)


def _do(act: Callable[[], T], future: Future[T]) -> None:
    try:
        answer = act()
    except BaseException as error:  # noqa: BLE001 - raised where it is waited for
        future.set_exception(error)
    else:
        future.set_result(answer)
