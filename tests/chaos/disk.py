"""A small file system of its own for the outputs of a run, so that it can be full without harm to anybody else."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

DISK_BYTES: Final = 256 << 20
"""Several times what the outputs of a run take."""

_FILLER: Final = ".filler"


class Disk:
    """A mounted file system that can be filled to its last byte."""

    def __init__(self, directory: Path) -> None:
        self._filler = directory / _FILLER

    def fill(self) -> None:
        """Take all room that is left, again and again as long as some is given back."""
        with self._filler.open("ab") as file:
            for size in (1 << 20, os.statvfs(file.fileno()).f_frsize):
                while True:
                    try:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
                    except OSError as error:
                        if error.errno != errno.ENOSPC:
                            raise
                        break

    def empty(self) -> None:
        """Give the room back."""
        self._filler.unlink(missing_ok=True)


@contextmanager
def small_disk(directory: Path) -> Iterator[Disk | None]:
    """A file system in memory, mounted at a directory, while the block runs; None where none may be mounted."""
    directory.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "chaos", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        yield None
        return
    try:
        yield Disk(directory)
    finally:
        # Lazily: it is gone from the tree at once, whoever still has a file of it open.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
