"""Processes that tests start."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def running(command: Sequence[object], **more: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that the block sees to the end of; when the block fails it is killed, so that nobody waits for it."""
    with subprocess.Popen([str(each) for each in command], **more) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise
