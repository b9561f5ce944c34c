"""Writing past the page cache.

What a merge writes is not read again soon, and copying it into the page cache, finding pages for it and writing them
back costs several times the write itself. So the pages that lie wholly within a part go from its buffer straight to the
disk, where the file system can do that and the buffer lies in memory as the part does in the file.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from workers.store import files
from workers.task import PAGE_BYTES

_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)


def write_at(path: Path, fd: int, offset: int, view: memoryview) -> None:
    """Write all of ``view`` at ``offset`` of ``path``, which is open as ``fd``: whole pages directly, where possible.

    Other writers may write the bytes before and after at the same time: no page that they share is written directly.
    """
    first = -offset % PAGE_BYTES
    last = first + (len(view) - first) // PAGE_BYTES * PAGE_BYTES
    if (
        last <= first
        or (  # direct writes begin and end on a page, in memory and in the file
            _address(view) + first
        )
        % PAGE_BYTES
    ):
        first = last = 0
    files.write_at(fd, offset, view[:first])
    done = first + _write_pages(path, offset + first, view[first:last])
    files.write_at(fd, offset + done, view[done:])


def _write_pages(path: Path, offset: int, view: memoryview) -> int:
    """Write pages directly; how many bytes there was a way to."""
    done = 0
    try:
        with files.opened(path, os.O_WRONLY | os.O_DIRECT) as fd:
            while done < len(view):
                done += os.pwrite(fd, view[done:], offset + done)
                if done % PAGE_BYTES:  # the rest is not aligned any more
                    break
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    return done


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)
