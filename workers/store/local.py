"""Objects as files under directories, for ``file:`` URIs.

Beside its objects a directory may hold ``.mergemill/`` with open uploads, temporary files and user metadata.
All of it is listed and deletable like any object, and it is removed when it is empty. Any number of processes
may use a directory at once, on one machine or on a shared file system with working ``flock`` and atomic
``link`` and ``rename``.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import unquote

from workers.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    TruncatedReadError,
)
from workers.store import fence, files, uris
from workers.store.base import Buffer, ObjectInfo, Upload, UploadedPart
from workers.store.disk import Disk
from workers.store.local_uploads import LocalUploads
from workers.store.settings import StoreSettings


class LocalStore:
    """The :class:`~workers.store.base.ObjectStore` of ``file:`` URIs."""

    def __init__(self, settings: StoreSettings | None = None) -> None:
        settings = settings or StoreSettings()
        self._disk = Disk(settings.file_roots)
        self._uploads = LocalUploads(self._disk, settings.file_lock_timeout_s, settings.file_direct_io)

    def head(self, uri: str) -> ObjectInfo:
        """See :meth:`ObjectStore.head`."""
        path = _path(uri)
        with files.mapped_errors("look up", uri):
            status = self._disk.status(path)
            _check_pin(uri, status, None)
            return ObjectInfo(uri, status.st_size, files.etag_of(status), self._metadata(path, status))

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        """See :meth:`ObjectStore.read_into`."""
        with files.mapped_errors("read", uri), self.opened(uri) as fd:
            status = os.fstat(fd)
            _check_pin(uri, status, etag)
            got = files.read_at(fd, start, buffer) if buffer.nbytes else min(0, status.st_size - start)
            _check_pin(uri, os.fstat(fd), etag)
        if got < buffer.nbytes:
            raise TruncatedReadError(
                f"{uri} ends at byte {status.st_size}; bytes {start}..{start + buffer.nbytes} were asked for"
            )

    @contextlib.contextmanager
    def opened(self, uri: str) -> Iterator[int]:
        """A descriptor to read an object by; of the directories that may be used, whatever is renamed meanwhile."""
        with files.mapped_errors("read", uri):
            fd = self._disk.open_object(_path(uri))
        try:
            yield fd
        finally:
            os.close(fd)

    def put(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """See :meth:`ObjectStore.put`."""
        return self._put(uri, data, metadata, overwrite=True)

    def put_if_absent(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """See :meth:`ObjectStore.put_if_absent`."""
        return self._put(uri, data, metadata, overwrite=False)

    def _put(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None, overwrite: bool) -> ObjectInfo:
        path, still = _path(uri), fence.enter()
        with files.mapped_errors("write", uri):
            self._disk.make_directories(path.parent)
            with self._disk.temporary(path, data) as draft:
                status = self._disk.own_status(draft)
                self._keep_metadata(path, status, metadata or {})
                try:
                    old = self._status(path) if overwrite else None
                    still()
                    # A link is atomic where open(O_EXCL) and write would not be.
                    (self._disk.rename if overwrite else self._disk.link)(draft, path)
                except BaseException as error:  # the file is not there, then
                    self._forget_metadata(path, status)
                    if isinstance(error, FileExistsError):
                        raise AlreadyExistsError(f"{uri} is already there") from None
                    raise
                self._forget_metadata(path, old)
                files.sync_directory(path.parent)
            return ObjectInfo(uri, status.st_size, files.etag_of(status), _lower(metadata or {}))

    def delete(self, uri: str) -> None:
        """See :meth:`ObjectStore.delete`."""
        path, still = _path(uri), fence.enter()
        with files.mapped_errors("delete", uri):
            status = self._status(path)
            if status is not None and stat.S_ISDIR(status.st_mode):
                return
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), self._disk.at(path) as there:
                still()
                there.unlink()
                files.sync_directory(there.parent)
            self._forget_metadata(path, status)
            self._disk.prune(path.parent)
            if path.parent.name == files.HIDDEN:
                self._uploads.sweep(path.parent)

    def check_writable(self, uri: str) -> None:
        """See :meth:`ObjectStore.check_writable`."""
        with files.mapped_errors("write", uri):
            self._disk.check_writable(_path(uri).parent)

    def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
        """See :meth:`ObjectStore.list`."""
        slash, _, tail = prefix.rpartition("/")
        if slash.endswith(":/"):  # file://, or file://localhost
            slash, tail = prefix, ""
        directory = _path(slash + "/")
        with files.mapped_errors("list", prefix):
            names = self._disk.files(directory, unquote(tail), beside)
            found = sorted((os.fsencode(path), path) for path in names)
        for _, path in found:
            status = self._status(path)
            # else it went while we listed, leads out of where we may look, or is a socket
            if status is not None and stat.S_ISREG(status.st_mode):
                yield ObjectInfo(uris.from_path(str(path)), status.st_size, files.etag_of(status))

    def presign(self, uri: str, expires_s: int) -> str | None:
        """``None``: a file has no URL that works elsewhere."""
        return None

    def open_upload(self, uri: str, size: int, metadata: Mapping[str, str]) -> Upload:
        """See :meth:`ObjectStore.open_upload`."""
        with files.mapped_errors("open an upload for", uri):
            return Upload(uri, self._uploads.open(_path(uri), size, _lower(metadata)))

    def put_part(self, upload: Upload, number: int, offset: int, data: Buffer) -> UploadedPart:
        """See :meth:`ObjectStore.put_part`."""
        with files.mapped_errors(f"write part {number} of", upload.uri):
            return self._uploads.write(_path(upload.uri), upload, number, offset, data)

    def copy_part(
        self, upload: Upload, number: int, offset: int, source: str, start: int, end: int, etag: str
    ) -> UploadedPart:
        """See :meth:`ObjectStore.copy_part`."""
        with files.mapped_errors("copy from", source), self.opened(source) as fd:

            def check() -> None:
                _check_pin(source, os.fstat(fd), etag)

            check()
            if end > os.fstat(fd).st_size:
                raise TruncatedReadError(f"{source} ends before byte {end}")
            with files.mapped_errors(f"write part {number} of", upload.uri):
                return self._uploads.copy(_path(upload.uri), upload, number, offset, fd, start, end, check)

    def list_parts(self, upload: Upload) -> builtins.list[UploadedPart]:
        """See :meth:`ObjectStore.list_parts`."""
        with files.mapped_errors("list the parts of", upload.uri):
            return self._uploads.parts(_path(upload.uri), upload)

    def list_uploads(self, uri: str) -> builtins.list[Upload]:
        """See :meth:`ObjectStore.list_uploads`."""
        with files.mapped_errors("list the uploads of", uri):
            return [Upload(uri, each) for each in self._uploads.ids(_path(uri))]

    def uploads_below(self, prefix: str) -> builtins.list[tuple[Upload, float]]:
        """See :meth:`ObjectStore.uploads_below`; what was never opened, or not removed, to the end is listed too."""
        with files.mapped_errors("list the uploads in", prefix):
            found = self._uploads.below(_path(prefix))
        return [(Upload(uris.join(prefix, name), each), opened_at) for name, each, opened_at in found]

    def complete(self, upload: Upload, parts: Sequence[UploadedPart]) -> None:
        """See :meth:`ObjectStore.complete`."""
        path = _path(upload.uri)
        with files.mapped_errors("complete", upload.uri):
            old = self._status(path)
            self._uploads.complete(path, upload, parts, self._keep_metadata)
            self._forget_metadata(path, old)

    def abort(self, upload: Upload) -> None:
        """See :meth:`ObjectStore.abort`."""
        with files.mapped_errors("abort the upload of", upload.uri):
            self._uploads.abort(_path(upload.uri), upload)

    def _status(self, path: Path) -> os.stat_result | None:
        try:
            return self._disk.status(path)
        except (FileNotFoundError, NotADirectoryError, AccessDeniedError):
            return None

    def _keep_metadata(self, path: Path, status: os.stat_result, metadata: Mapping[str, str]) -> None:
        """Record user metadata for the file with ``status`` that is about to become ``path``.

        It is filed under the file's ETag, so it never speaks for what was at ``path`` before or comes after.
        """
        if metadata:
            record = _metadata_file(path, status)
            text = json.dumps({"name": path.name, "metadata": _lower(metadata)})
            self._disk.in_directory(record.parent, lambda: self._disk.replace_file(record, text.encode()))

    def _forget_metadata(self, path: Path, status: os.stat_result | None) -> None:
        if status is not None:
            record = _metadata_file(path, status)
            self._disk.unlink(record)
            self._disk.prune(record.parent)

    def _metadata(self, path: Path, status: os.stat_result) -> dict[str, str]:
        try:
            record = self._disk.record(_metadata_file(path, status)) or {}
        except (FileNotFoundError, NotADirectoryError, StoreError):
            return {}
        found = record.get("metadata")
        if record.get("name") != path.name or not isinstance(found, dict):
            return {}
        return {key: value for key, value in found.items() if isinstance(value, str)}


def _metadata_file(path: Path, status: os.stat_result) -> Path:
    return files.hidden_directory(path) / "objects" / f"{files.etag_of(status)}.json"


def _path(uri: str) -> Path:
    return Path(uris.to_path(uri))


def _lower(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key.lower(): value for key, value in metadata.items()}


def _check_pin(uri: str, status: os.stat_result, etag: str | None) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ObjectNotFoundError(f"{uri} is a directory or a device, not an object")
    if etag is not None and files.etag_of(status) != etag:
        found = files.etag_of(status)
        raise ObjectChangedError(
            f"{uri} has changed since it was planned with: its ETag is {found}, not {etag}"
        )
