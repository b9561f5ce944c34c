"""Files under the directories that a service may use, whoever else can write there.

Between looking at a path and using it, somebody may put a symbolic link in its place. So nothing is done by a path that
was checked: its directory is opened first (``O_PATH``, which touches nothing), where that leads is asked of the kernel
(``/proc/self/fd``), and everything is then done relative to the open directory. Below :data:`.files.HIDDEN`
no link is followed at all. What is opened to be read is opened first and judged afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from workers.errors import AccessDeniedError, ObjectNotFoundError, StoreError
from workers.store import files
from workers.store.base import Buffer
from workers.store.files import HIDDEN

MAX_RECORD_BYTES = 1 << 20
"""Longest of the store's own notes that is read."""

Made = TypeVar("Made")

_PRUNED_ATTEMPTS = 100
_LOOK = os.O_PATH | os.O_CLOEXEC
_DIRECTORY = _LOOK | os.O_DIRECTORY


class Disk:
    """What the directory store does to files. Raises ``OSError``, and ``AccessDeniedError`` outside the roots.

    :param roots: absolute paths of the directories that may be used, with all below; ``None`` for any.
    """

    def __init__(self, roots: Sequence[str] | None = None) -> None:
        self._roots = None if roots is None or "/" in roots else tuple(roots)

    @contextlib.contextmanager
    def held(self, directory: Path) -> Iterator[Path]:
        """``directory`` by a path that leads to it, and to nothing else, whatever is renamed meanwhile."""
        if self._roots is None and HIDDEN not in directory.parts:
            yield directory
            return
        fd = self._open_directory(directory)
        here = f"/proc/self/fd/{fd}"
        try:
            yield Path(here)
        except OSError as error:
            if isinstance(error.filename, str) and error.filename.startswith(here):
                error.filename = f"{directory}{error.filename.removeprefix(here)}"
            raise
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def at(self, path: Path) -> Iterator[Path]:
        """``path`` in a directory that is :meth:`held`; the last name itself may still be a link."""
        with self.held(path.parent) as directory:
            yield directory / path.name

    @contextlib.contextmanager
    def opened(self, path: Path, flags: int) -> Iterator[int]:
        """A file descriptor of one of the store's own files, never by way of a link."""
        with self.at(path) as there:
            fd = os.open(there, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            _check_regular(fd, path)
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def looked_up(self, path: Path) -> Iterator[int]:
        """What ``path`` leads to, links followed: a descriptor that can be asked about and not be read."""
        self._check_name(path.parent)
        fd = os.open(path, _LOOK)
        try:
            self._check_place(fd, path)
            yield fd
        finally:
            os.close(fd)

    def status(self, path: Path) -> os.stat_result:
        """The status of what ``path`` leads to."""
        with self.looked_up(path) as fd:
            return os.fstat(fd)

    def own_status(self, path: Path) -> os.stat_result:
        """The status of one of the store's own files, no link followed."""
        with self.at(path) as there:
            return there.lstat()

    def open_object(self, path: Path) -> int:
        """A descriptor to read a regular file by; the caller closes it. Neither a pipe nor a device is touched."""
        with self.looked_up(path) as found:
            _check_regular(found, path)
            return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)

    def files(self, directory: Path, beginning: str, beside: bool) -> list[Path]:
        """Everything in ``directory`` whose name starts so; unless ``beside``, what is below such directories too.

        A link to a directory is listed as itself: what lies there belongs to somebody else.
        """
        try:
            with self.held(directory) as here:
                return [directory / path.relative_to(here) for path in _files_under(here, beginning, beside)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def names(self, directory: Path) -> list[str]:
        """What is in ``directory``, sorted; nothing where there is none."""
        try:
            with self.held(directory) as here:
                return sorted(os.listdir(here))  # noqa: PTH208 - names, not paths through the held one
        except FileNotFoundError:
            return []

    def record(self, path: Path) -> dict[str, Any] | None:
        """A note of the store's own; None for what is none, since whoever can write beside can write there."""
        with self.opened(path, os.O_RDONLY) as fd:
            size = os.fstat(fd).st_size
            data = bytearray(min(size, MAX_RECORD_BYTES + 1))
            del data[files.read_at(fd, 0, memoryview(data)) :]
        try:
            found = json.loads(data) if size <= MAX_RECORD_BYTES else None
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def in_directory(self, directory: Path, make: Callable[[], Made]) -> Made:
        """What ``make`` returns, with ``directory`` there; again if somebody prunes it, empty, in between."""
        for _ in range(_PRUNED_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                self.make_directories(directory)
                return make()
        self.make_directories(directory)
        return make()

    def make_directories(self, path: Path) -> None:
        """Make ``path`` and what is missing above it, durably."""
        missing = []
        while not path.exists():
            missing.append(path)
            path = path.parent
        for each in reversed(missing):
            with self.at(each) as there:
                there.mkdir(exist_ok=True)
                files.sync_directory(there.parent)

    def check_writable(self, directory: Path) -> None:
        """Make a file without a name in ``directory``, or above it what is there: files can be made then.

        :raises StoreError: there can be none; names the directory and the cause.
        """
        while not os.path.lexists(directory):
            directory = directory.parent
        if not directory.is_dir():
            raise StoreError(f"{directory} is a file, and there can be no directory in its place")
        try:
            with self.held(directory) as here, tempfile.TemporaryFile(dir=here):
                pass
        except StoreError:
            raise
        except OSError as error:
            reason = f"cannot write to the directory {directory}: {os.strerror(error.errno) if error.errno else error}"
            if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
                raise AccessDeniedError(f"{reason}; check its permissions") from error
            raise StoreError(f"{reason}; choose another place") from error

    @contextlib.contextmanager
    def temporary(self, path: Path, data: Buffer) -> Iterator[Path]:
        """A durable file with ``data`` in the hidden directory of ``path``; gone afterwards unless renamed."""
        directory = files.hidden_directory(path) / "tmp"
        name = directory / secrets.token_hex(8)

        def write() -> None:
            with self.opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
                files.write_at(fd, 0, data)
                files.stamp(fd)
                os.fsync(fd)

        try:
            self.in_directory(directory, write)
            yield name
        finally:
            self.unlink(name)
            self.prune(directory)

    def replace_file(self, path: Path, data: Buffer) -> None:
        """Write a small file whole, atomically and durably; its directory exists."""
        draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
        try:
            with self.opened(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as fd:
                files.write_at(fd, 0, data)
                os.fsync(fd)
            self.rename(draft, path)
        except OSError:
            self.unlink(draft)
            raise
        files.sync_directory(path.parent)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file over what is there."""
        with self.at(old) as source, self.at(new) as target:
            source.replace(target)

    def link(self, old: Path, new: Path) -> None:
        """Give a file a second name, where nothing is."""
        with self.at(old) as source, self.at(new) as target:
            target.hardlink_to(source)

    def unlink(self, path: Path) -> None:
        """Remove a name; it is no error when it is gone."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), self.at(path) as there:
            there.unlink()

    def remove_tree(self, directory: Path) -> None:
        """Remove a directory with all in it, as far as that goes."""
        with contextlib.suppress(OSError), self.at(directory) as there:
            shutil.rmtree(there, ignore_errors=True)

    def prune(self, directory: Path) -> None:
        """Remove ``directory`` and the ones above it as far as they are empty and hidden."""
        while HIDDEN in directory.parts:
            try:
                with self.at(directory) as there:
                    there.rmdir()
            except FileNotFoundError:
                pass  # somebody else was first; what is above may still be ours to remove
            except OSError:
                return
            directory = directory.parent

    def _open_directory(self, directory: Path) -> int:
        depth = directory.parts.index(HIDDEN) if HIDDEN in directory.parts else len(directory.parts)
        visible = Path(*directory.parts[:depth])
        self._check_name(visible)
        fd = os.open(visible, _DIRECTORY)
        try:
            self._check_place(fd, visible)
            for name in directory.parts[depth:]:
                fd, above = _open_below(fd, name, directory), fd
                os.close(above)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check_name(self, path: Path) -> None:
        """Refuse what is outside by its name without a look at it, so that nobody learns what is there."""
        if self._roots is not None:
            named = str(path)
            if not any(_is_below(named, root) or _is_below(named, _real(root)) for root in self._roots):
                raise self._outside(path)

    def _check_place(self, fd: int, path: Path) -> None:
        if self._roots is not None:
            place = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - bytes of the kernel, not a path of ours
            if not any(_is_below(place, _real(root)) for root in self._roots):
                raise self._outside(path)

    def _outside(self, path: Path) -> AccessDeniedError:
        allowed = "lies, or leads, outside of" if self._roots else "is on a disk, and there are none of"
        return AccessDeniedError(
            f"{path} {allowed} the directories that this service may use: its operator sets them with "
            "MERGEMILL_STORE__FILE_ROOTS"
        )


def _open_below(fd: int, name: str, directory: Path) -> int:
    try:
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    except NotADirectoryError:
        raise StoreError(
            f"{directory} is not used: {name!r} in it is a link or a file where a directory of this service has to be"
        ) from None


def _check_regular(fd: int, path: Path) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ObjectNotFoundError(f"{path} is a directory or a device, not an object")


def _files_under(directory: Path, beginning: str, beside: bool) -> Iterator[Path]:
    for entry in directory.iterdir():
        if entry.name.startswith(beginning):
            if entry.is_dir() and not entry.is_symlink():
                for root, _, names in os.walk(entry) if not beside else ():
                    yield from (Path(root, each) for each in names)
            else:
                yield entry


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")


def _real(root: str) -> str:
    return os.path.realpath(root)
