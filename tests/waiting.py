"""Waiting for what comes about by itself."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    condition: Callable[[], object], what: str = "it did not happen in time", *, seconds: float = 40.0
) -> None:
    """Wait until a condition holds.

    :raises AssertionError: it does not after so many seconds; says ``what``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
