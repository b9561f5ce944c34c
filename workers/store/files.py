"""Bytes, locks, tags and errors of local files, by open descriptors; what goes by paths is in ``disk.py``."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from workers.errors import AccessDeniedError, ObjectNotFoundError, StoreError, StoreUnavailableError
from workers.store.base import Buffer

HIDDEN = ".mergemill"
"""Directory that holds uploads, temporary files and metadata, beside the objects that they belong to."""

_LOCK_POLL_S = 0.01
_COPY_BYTES = 1 << 20
_CANNOT_COPY_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}


@contextlib.contextmanager
def mapped_errors(action: str, uri: str) -> Iterator[None]:
    """Turn any ``OSError`` of the operating system into the store error that says what to do."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise _translated(error, action, uri) from error


def _translated(error: OSError, action: str, uri: str) -> StoreError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR if action == "write":
            return StoreError(f"cannot {action} {uri}: {reason}: {error.filename}")
        case errno.ENOENT | errno.ENOTDIR:
            return ObjectNotFoundError(f"cannot {action} {uri}: there is no such object")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return AccessDeniedError(
                f"cannot {action} {uri}: {reason}; check the permissions of {error.filename}"
            )
        case errno.ENOSPC | errno.EDQUOT:
            return StoreError(f"cannot {action} {uri}: {reason}; free some space or choose another output")
        case errno.EIO | errno.ESTALE | errno.ETIMEDOUT:
            return StoreUnavailableError(f"cannot {action} {uri}: {reason}")
        case _:
            return StoreError(f"cannot {action} {uri}: {reason}")


def hidden_directory(path: Path) -> Path:
    """The :data:`HIDDEN` directory for the object at ``path``: beside it, or the one that it lies in."""
    if HIDDEN in path.parts[:-1]:
        depth = path.parts.index(HIDDEN)
        return Path(*path.parts[: depth + 1])
    return path.parent / HIDDEN


def etag_of(status: os.stat_result) -> str:
    """A tag that differs whenever the content does: inode, size and modification time in nanoseconds."""
    return f"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"


def stamp(fd: int) -> None:
    """Set the modification time to now, in nanoseconds: the kernel's own ticks take milliseconds."""
    now = time.time_ns()
    os.utime(fd, ns=(now, now))


def sync_directory(path: Path) -> None:
    """Make renames and new names in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """A file descriptor for the length of a ``with`` block."""
    fd = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def write_at(fd: int, offset: int, data: Buffer) -> None:
    """Write all of ``data`` at ``offset``."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def read_at(fd: int, offset: int, buffer: memoryview) -> int:
    """Fill ``buffer`` from ``offset``; the number of bytes that there were."""
    view = buffer.cast("B")
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if not got:
            break
        done += got
    return done


def copy_at(source: int, start: int, target: int, offset: int, count: int) -> int:
    """Copy ``count`` bytes between files, in the kernel where it can; the number of bytes that there were."""
    done = 0
    try:
        while done < count:
            got = os.copy_file_range(source, target, count - done, start + done, offset + done)
            if not got:
                return done
            done += got
    except OSError as error:
        if error.errno not in _CANNOT_COPY_IN_KERNEL:
            raise
    step = memoryview(bytearray(min(_COPY_BYTES, count - done)))
    while done < count:
        piece = step[: count - done]
        got = read_at(source, start + done, piece)
        write_at(target, offset + done, piece[:got])
        done += got
        if got < len(piece):
            break
    return done


@contextlib.contextmanager
def locked(fd: int, how: int, timeout_s: float, uri: str) -> Iterator[None]:
    """Hold ``flock`` on ``fd`` (``LOCK_SH`` or ``LOCK_EX``); the kernel drops it when its holder dies.

    :raises StoreUnavailableError: another process held it for ``timeout_s`` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            break
        except BlockingIOError as busy:
            if time.monotonic() > deadline:
                raise StoreUnavailableError(
                    f"{uri}: another process has been writing this upload for {timeout_s:g} s; is it stopped?"
                ) from busy
        time.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)
