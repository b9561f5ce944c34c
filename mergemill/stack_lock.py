"""One stack a state directory: a lock that ends with the process that holds it, and says where that one answers."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final, Self

from workers.errors import StackError

LOCK_FILE: Final = "stack.lock"
"""Its name in the state directory; it holds the URL of the stack."""


class StackLock:
    """The right to run a stack in ``state_dir``, until :meth:`release` or the end of this process.

    :raises StackError: another stack has it; says where that one answers.
    """

    def __init__(self, state_dir: Path) -> None:
        self._file = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            url = os.pread(self._file, 1000, 0).decode(errors="replace").strip()
            os.close(self._file)
            use = f" at {url}: use that one (export MERGEMILL_URL={url}), or" if url else ":"
            raise StackError(
                f"Mergemill is already running in {state_dir}{use} start another with --state-dir DIR and --port 0"
            ) from None
        os.ftruncate(self._file, 0)

    def tell(self, url: str) -> Self:
        """Note where the stack answers."""
        os.pwrite(self._file, url.encode(), 0)
        return self

    def release(self) -> None:
        """Let another stack have the directory; again is no error."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
