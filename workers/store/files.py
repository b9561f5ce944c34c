"""Durable, atomic operations on local files that the directory store is made of."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from workers.errors import AccessDeniedError, ObjectNotFoundError, StoreError, StoreUnavailableError
from workers.store.base import Buffer

HIDDEN = ".mergemill"
"""Directory that holds uploads, temporary files and metadata, beside the objects that they belong to."""

Made = TypeVar("Made")

_PRUNED_ATTEMPTS = 100
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


def in_directory(directory: Path, make: Callable[[], Made]) -> Made:
    """What ``make`` returns, with ``directory`` there; again if somebody prunes it, empty, in between."""
    for _ in range(_PRUNED_ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            make_directories(directory)
            return make()
    make_directories(directory)
    return make()


def make_directories(path: Path) -> None:
    """Make ``path`` and what is missing above it, durably."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_directory(each.parent)


def check_directory_writable(path: Path) -> None:
    """Raise what making files in ``path``, and what is missing above it, would meet: by making one without a name.

    :raises StoreError: there can be none; names the directory and the cause.
    """
    while not os.path.lexists(path):
        path = path.parent
    if not path.is_dir():
        raise StoreError(f"{path} is a file, and there can be no directory in its place")
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = f"cannot write to the directory {path}: {os.strerror(error.errno) if error.errno else error}"
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise AccessDeniedError(f"{reason}; check its permissions") from error
        raise StoreError(f"{reason}; choose another place") from error


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


@contextlib.contextmanager
def temporary(path: Path, data: Buffer) -> Iterator[Path]:
    """A durable file with ``data`` in the hidden directory of ``path``; gone afterwards unless renamed."""
    directory = hidden_directory(path) / "tmp"
    name = directory / secrets.token_hex(8)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    fd = in_directory(directory, lambda: os.open(name, flags, 0o666))
    try:
        try:
            write_at(fd, 0, data)
            stamp(fd)
            os.fsync(fd)
        finally:
            os.close(fd)
        yield name
    finally:
        name.unlink(missing_ok=True)
        prune(directory)


def replace_file(path: Path, data: Buffer) -> None:
    """Write a small file whole, atomically and durably; its directory exists."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        with opened(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
            write_at(fd, 0, data)
            os.fsync(fd)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def prune(directory: Path) -> None:
    """Remove ``directory`` and the ones above it as far as they are empty and hidden."""
    while HIDDEN in directory.parts:
        try:
            directory.rmdir()
        except FileNotFoundError:
            pass  # somebody else was first; what is above may still be ours to remove
        except OSError:
            return
        directory = directory.parent


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
