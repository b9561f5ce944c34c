"""Changes that come too late are refused: whoever makes them says until when they may be made.

A process can be stopped between finding out that something is still its own and changing it, and go on when it is
somebody else's. So it is the store that asks, right before each change, and it lets none have effect after what it
was told: S3 refuses a request whose signature has expired (:mod:`workers.store.s3_expiry`), and for a directory
the clock is looked at once more right before the system call that nobody can take back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Permit = Callable[[], float]
"""Until when a change may be made, in Unix seconds; raises, whatever it likes, when it may not be made at all."""

_PERMIT: ContextVar[Permit | None] = ContextVar("permit", default=None)


@contextmanager
def fenced(permit: Permit) -> Iterator[None]:
    """Have every store ask ``permit`` before each change that this thread makes within."""
    token = _PERMIT.set(permit)
    try:
        yield
    finally:
        _PERMIT.reset(token)


def is_active() -> bool:
    """Whether permission has to be asked for."""
    return _PERMIT.get() is not None


def ask() -> float | None:
    """Ask for permission; until when, in Unix seconds, or ``None`` when nobody has to be asked."""
    permit = _PERMIT.get()
    return None if permit is None else permit()


def enter() -> Callable[[], None]:
    """Ask for permission; what comes back is called right before the change, and asks again if it got late."""
    until = ask()

    def still() -> None:
        nonlocal until
        while until is not None and time.time() >= until:
            until = ask()

    return still
