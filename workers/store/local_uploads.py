"""Multipart uploads in a directory: one hidden file per upload, written in place.

An upload for ``<dir>/<name>`` lives in ``<dir>/.mergemill/uploads/<id>/``:

- ``upload.json``: name, size and user metadata of the object-to-be; written last on opening;
- ``data``: the bytes, at their final offsets, space reserved;
- ``parts/<number>.json``: offset, size and tag of a part whose bytes are on the disk;
- ``parts/<number>.lock``: held while that part is written.

A record is removed before its part is written again, and written after the bytes are synced, so what is
recorded is true after a crash at any point. Writers share a lock on ``data`` that completing takes alone: no
late writer touches the object once it is visible. Completing renames ``data`` away, which can succeed once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import TypeAdapter, ValidationError

from workers.errors import (
    InvalidPartError,
    MergemillError,
    StoreError,
    TruncatedReadError,
    UploadNotFoundError,
)
from workers.store import direct, fence, files
from workers.store.base import Buffer, Upload, UploadedPart
from workers.store.disk import Disk

NAMELESS = "model-00000-of-00000.safetensors"
"""What an upload counts as that nobody can tell the object of any more."""

_REMOVED = "-removed"

MAX_PARTS = 10_000
"""As in S3, so that a plan fits every store."""

_TAG_WORDS = 1 << 13

KeepMetadata = Callable[[Path, os.stat_result, Mapping[str, str]], None]


@dataclass(frozen=True, slots=True)
class _Record:
    """What ``parts/<number>.json`` holds."""

    offset: int
    """First byte within the object."""
    size: int
    """Length in bytes."""
    etag: str
    """A tag of the bytes, or of the source of a copy."""


@dataclass(frozen=True, slots=True)
class _Opening:
    """What ``upload.json`` holds."""

    name: str
    """File name of the object, so that a moved directory stays whole."""
    size: int
    """Bytes of the object."""
    metadata: dict[str, str]
    """User metadata of the object."""


_OPENING, _RECORD = TypeAdapter(_Opening), TypeAdapter(_Record)
Note = TypeVar("Note")


class LocalUploads:
    """The uploads beside given paths. Raises plain ``OSError`` where the disk fails."""

    def __init__(self, disk: Disk, lock_timeout_s: float, direct_io: bool) -> None:
        self._disk = disk
        self._lock_timeout_s = lock_timeout_s
        self._direct = direct_io

    def open(self, path: Path, size: int, metadata: dict[str, str]) -> str:
        """Reserve ``size`` bytes for ``path``; the upload's id."""
        name, still = uuid.uuid4().hex, fence.enter()
        directory = _uploads(path) / name
        try:
            self._disk.in_directory(directory / "parts", lambda: None)
            with self._disk.opened(directory / "data", os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
                _reserve(fd, size)
                os.fsync(fd)
            opening = _Opening(path.name, size, metadata)
            still()
            self._disk.replace_file(directory / "upload.json", json.dumps(asdict(opening)).encode())
        except (OSError, MergemillError):
            self._disk.remove_tree(directory)
            self._disk.prune(directory.parent)
            raise
        return name

    def write(self, path: Path, upload: Upload, number: int, offset: int, data: Buffer) -> UploadedPart:
        """Write one part's bytes and record them."""
        view = memoryview(data).cast("B")
        etag = _tag(view)
        with self._writing(path, upload, number, _Record(offset, len(view), etag)) as fd:
            if self._direct:
                direct.write_at(Path(f"/proc/self/fd/{fd}"), fd, offset, view)
            else:
                files.write_at(fd, offset, view)
        return UploadedPart(number, len(view), etag)

    def copy(
        self,
        path: Path,
        upload: Upload,
        number: int,
        offset: int,
        source: int,
        start: int,
        end: int,
        check: Callable[[], None],
    ) -> UploadedPart:
        """As :meth:`write`, from the open file ``source``; ``check`` raises if that changed meanwhile."""
        status = os.fstat(source)
        origin = f"{status.st_dev:x}-{files.etag_of(status)}-{start:x}-{end:x}"
        etag = f"copy-{zlib.crc32(origin.encode()):08x}"
        with self._writing(path, upload, number, _Record(offset, end - start, etag)) as fd:
            if files.copy_at(source, start, fd, offset, end - start) < end - start:
                raise TruncatedReadError(
                    f"the source of part {number} of {upload.uri} ends before byte {end}"
                )
            check()
        return UploadedPart(number, end - start, etag)

    def parts(self, path: Path, upload: Upload) -> list[UploadedPart]:
        """What is recorded, by number."""
        directory, _ = self._opened(path, upload)
        records = self._records(directory)
        return [
            UploadedPart(number, records[number].size, records[number].etag) for number in sorted(records)
        ]

    def ids(self, path: Path) -> list[str]:
        """The open uploads for exactly ``path``."""
        found = []
        for name in self._disk.names(_uploads(path)):
            with contextlib.suppress(UploadNotFoundError):
                self._opened(path, Upload(str(path), name))
                found.append(name)
        return found

    def below(self, directory: Path) -> list[tuple[str, str, float]]:
        """Object, id and time of every upload in a directory, also of those that were half made or half removed."""
        found = []
        uploads = _uploads(directory / NAMELESS)
        for name in self._disk.names(uploads):
            with contextlib.suppress(FileNotFoundError):
                opened_at = self._disk.own_status(uploads / name).st_mtime
                try:
                    opening = _read(_OPENING, self._disk.record(uploads / name / "upload.json"))
                except FileNotFoundError:
                    opening = None
                which = name.removesuffix(_REMOVED)
                found.append((opening.name if opening else NAMELESS, which, opened_at))
        return found

    def complete(
        self, path: Path, upload: Upload, parts: Sequence[UploadedPart], keep_metadata: KeepMetadata
    ) -> None:
        """Check the parts, and move the data into place."""
        directory, opening = self._opened(path, upload)
        still = fence.enter()
        still()
        _check_complete(upload.uri, opening.size, parts, self._records(directory))
        with _gone_is_not_found(upload), self._disk.opened(directory / "data", os.O_RDWR) as fd:
            os.fsync(fd)
            with files.locked(fd, fcntl.LOCK_EX, self._lock_timeout_s, upload.uri):
                still()
                self._disk.own_status(
                    directory / "data"
                )  # else another completed it: the file is in its place
                files.stamp(fd)
                keep_metadata(path, os.fstat(fd), opening.metadata)
                self._disk.rename(directory / "data", path)
        files.sync_directory(path.parent)
        _remove(self._disk, directory)

    def abort(self, path: Path, upload: Upload) -> None:
        """Remove the upload."""
        fence.enter()()
        with contextlib.suppress(UploadNotFoundError):
            _remove(self._disk, _directory(path, upload))

    def sweep(self, hidden: Path) -> None:
        """Remove directories without a file: whoever opened or removed an upload in them was killed half-way."""
        for name in self._disk.names(hidden / "uploads"):
            directory = hidden / "uploads" / name
            if not {*self._disk.names(directory)} - {"parts"}:
                self._disk.prune(directory / "parts")

    @contextlib.contextmanager
    def _writing(self, path: Path, upload: Upload, number: int, record: _Record) -> Iterator[int]:
        directory, opening = self._opened(path, upload)
        if not 1 <= number <= MAX_PARTS:
            raise StoreError(f"part number {number} of {upload.uri} is not within 1..{MAX_PARTS}")
        if not 0 <= record.offset <= record.offset + record.size <= opening.size:
            raise StoreError(
                f"part {number} of {upload.uri}, bytes {record.offset} to {record.offset + record.size}, "
                f"does not fit into {opening.size} bytes"
            )
        note = directory / "parts" / f"{number}.json"
        with (
            _gone_is_not_found(upload),
            self._disk.opened(directory / "data", os.O_RDWR) as fd,
            self._disk.opened(note.with_suffix(".lock"), os.O_RDWR | os.O_CREAT) as part_fd,
            files.locked(part_fd, fcntl.LOCK_EX, self._lock_timeout_s, upload.uri),
            files.locked(fd, fcntl.LOCK_SH, self._lock_timeout_s, upload.uri),
        ):
            # Between opening and locking it may have been completed, and `fd` be the object that others read.
            if not os.path.samestat(os.fstat(fd), self._disk.own_status(directory / "data")):
                raise UploadNotFoundError(f"upload {upload.id} of {upload.uri} was completed meanwhile")
            with contextlib.suppress(FileNotFoundError), self._disk.at(note) as there:
                there.unlink()
                files.sync_directory(there.parent)
            yield fd
            os.fdatasync(fd)
            self._disk.replace_file(note, json.dumps(asdict(record)).encode())

    def _opened(self, path: Path, upload: Upload) -> tuple[Path, _Opening]:
        directory = _directory(path, upload)
        try:
            opening = _read(_OPENING, self._disk.record(directory / "upload.json"))
            self._disk.own_status(directory / "data")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _not_found(upload) from error
        if opening is None or opening.name != path.name:
            raise _not_found(upload)
        return directory, opening

    def _records(self, directory: Path) -> dict[int, _Record]:
        records = {}
        for name in self._disk.names(directory / "parts"):
            number, dot, kind = name.partition(".")
            if number.isdecimal() and f"{dot}{kind}" == ".json":
                with contextlib.suppress(FileNotFoundError):  # it is being written again right now
                    record = _read(_RECORD, self._disk.record(directory / "parts" / name))
                    if record is not None:
                        records[int(number)] = record
        return records


def _read(kind: TypeAdapter[Note], record: dict[str, Any] | None) -> Note | None:
    """A note as it was written; None for anything else."""
    try:
        return kind.validate_python(record)
    except ValidationError:
        return None


def _tag(view: memoryview) -> str:
    """A short tag of some bytes, by which a part that was made again is known for the same.

    It guards nothing, and words that change places within 64 KiB do not change it: sums of words of 8 bytes over runs
    of 64 KiB, hashed in their order. A CRC-32 of all bytes takes 0.28 s a GiB.
    """
    words = np.frombuffer(view[: len(view) // 8 * 8], dtype="<u8")
    whole = len(words) // _TAG_WORDS * _TAG_WORDS
    sums = words[:whole].reshape(-1, _TAG_WORDS).sum(axis=1, dtype=np.uint64)
    hashed = hashlib.sha256(sums.tobytes())
    hashed.update(words[whole:].tobytes())
    hashed.update(view[len(words) * 8 :])
    return hashed.hexdigest()[:16]


def _uploads(path: Path) -> Path:
    return files.hidden_directory(path) / "uploads"


def _directory(path: Path, upload: Upload) -> Path:
    if not upload.id.isalnum():  # never let an id climb out of the directory
        raise _not_found(upload)
    return _uploads(path) / upload.id


def _not_found(upload: Upload) -> UploadNotFoundError:
    return UploadNotFoundError(
        f"upload {upload.id} of {upload.uri} was completed or aborted, or never opened"
    )


@contextlib.contextmanager
def _gone_is_not_found(upload: Upload) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError as error:
        raise _not_found(upload) from error


def _reserve(fd: int, size: int) -> None:
    """Set the length, and take the space now where the file system can: better no room now than half-way."""
    if size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    os.ftruncate(fd, size)


def _check_complete(uri: str, size: int, parts: Sequence[UploadedPart], records: dict[int, _Record]) -> None:
    """:raises InvalidPartError: the parts are not so recorded, or do not make ``size`` bytes gaplessly."""
    if not parts:
        raise InvalidPartError(f"cannot complete {uri}: no part was named")
    end = 0
    for part in sorted(parts, key=lambda each: each.number):
        record = records.get(part.number)
        if record is None or record.etag != part.etag:
            held = "nothing" if record is None else record.etag
            raise InvalidPartError(f"cannot complete {uri}: part {part.number} is {held}, not {part.etag}")
        if record.offset != end:
            raise InvalidPartError(
                f"cannot complete {uri}: part {part.number} begins at {record.offset}, not {end}"
            )
        end += record.size
    if end != size:
        raise InvalidPartError(f"cannot complete {uri}: its parts make {end} bytes, not {size}")


def _remove(disk: Disk, directory: Path) -> None:
    """Remove an upload: at once for everybody else, by a rename, and then file by file."""
    doomed = directory.with_name(f"{directory.name}{_REMOVED}")
    with contextlib.suppress(FileNotFoundError):
        disk.rename(directory, doomed)
    disk.remove_tree(doomed)
    disk.prune(doomed.parent)
