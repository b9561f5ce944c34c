"""All stores behind one: each URI goes to the store of its scheme."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence

from workers.errors import StoreError
from workers.store.base import Buffer, ObjectInfo, ObjectStore, Upload, UploadedPart
from workers.store.copying import copy_through
from workers.store.local import LocalStore
from workers.store.s3 import S3Store
from workers.store.settings import StoreSettings
from workers.store.uris import scheme

READ_LIMIT_BYTES = 100 << 20
"""The most that :func:`read_bytes` takes into memory unless told otherwise."""


class Stores:
    """An :class:`~workers.store.base.ObjectStore` for every scheme that there is a store for.

    All methods raise :class:`~workers.errors.StoreError` for a scheme that there is none for.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self._s3 = S3Store(settings)
        self._by_scheme: dict[str, ObjectStore] = {"s3": self._s3, "file": LocalStore(settings)}

    def _of(self, uri: str) -> ObjectStore:
        return self._by_scheme[scheme(uri)]

    def close(self) -> None:
        """Close this process's connections; the next use opens new ones."""
        self._s3.close()

    def head(self, uri: str) -> ObjectInfo:
        """See :meth:`ObjectStore.head`."""
        return self._of(uri).head(uri)

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        """See :meth:`ObjectStore.read_into`."""
        self._of(uri).read_into(uri, start, buffer, etag)

    def put(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """See :meth:`ObjectStore.put`."""
        return self._of(uri).put(uri, data, metadata)

    def put_if_absent(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """See :meth:`ObjectStore.put_if_absent`."""
        return self._of(uri).put_if_absent(uri, data, metadata)

    def delete(self, uri: str) -> None:
        """See :meth:`ObjectStore.delete`."""
        self._of(uri).delete(uri)

    def check_writable(self, uri: str) -> None:
        """See :meth:`ObjectStore.check_writable`."""
        self._of(uri).check_writable(uri)

    def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
        """See :meth:`ObjectStore.list`."""
        return self._of(prefix).list(prefix, beside=beside)

    def presign(self, uri: str, expires_s: int) -> str | None:
        """See :meth:`ObjectStore.presign`."""
        return self._of(uri).presign(uri, expires_s)

    def open_upload(self, uri: str, size: int, metadata: Mapping[str, str]) -> Upload:
        """See :meth:`ObjectStore.open_upload`."""
        return self._of(uri).open_upload(uri, size, metadata)

    def put_part(self, upload: Upload, number: int, offset: int, data: Buffer) -> UploadedPart:
        """See :meth:`ObjectStore.put_part`."""
        return self._of(upload.uri).put_part(upload, number, offset, data)

    def copy_part(
        self, upload: Upload, number: int, offset: int, source: str, start: int, end: int, etag: str
    ) -> UploadedPart:
        """See :meth:`ObjectStore.copy_part`; between two stores the bytes come through this process."""
        reader, writer = self._of(source), self._of(upload.uri)
        if reader is writer:
            return writer.copy_part(upload, number, offset, source, start, end, etag)
        return copy_through(reader, writer, upload, number, offset, source, start, end, etag)

    def list_parts(self, upload: Upload) -> builtins.list[UploadedPart]:
        """See :meth:`ObjectStore.list_parts`."""
        return self._of(upload.uri).list_parts(upload)

    def list_uploads(self, uri: str) -> builtins.list[Upload]:
        """See :meth:`ObjectStore.list_uploads`."""
        return self._of(uri).list_uploads(uri)

    def uploads_below(self, prefix: str) -> builtins.list[tuple[Upload, float]]:
        """See :meth:`ObjectStore.uploads_below`."""
        return self._of(prefix).uploads_below(prefix)

    def complete(self, upload: Upload, parts: Sequence[UploadedPart]) -> None:
        """See :meth:`ObjectStore.complete`."""
        self._of(upload.uri).complete(upload, parts)

    def abort(self, upload: Upload) -> None:
        """See :meth:`ObjectStore.abort`."""
        self._of(upload.uri).abort(upload)


def open_stores(settings: StoreSettings | None = None) -> Stores:
    """All stores, reached as ``settings`` say. Nothing is connected until it is used."""
    return Stores(settings or StoreSettings())


def read_range(store: ObjectStore, uri: str, start: int, end: int, etag: str | None = None) -> bytearray:
    """Bytes ``[start, end)`` of an object.

    :raises StoreError: as :meth:`ObjectStore.read_into`.
    """
    data = bytearray(end - start)
    store.read_into(uri, start, memoryview(data), etag)
    return data


def read_bytes(store: ObjectStore, uri: str, limit: int = READ_LIMIT_BYTES) -> bytes:
    """A small object whole, all of one version.

    :raises StoreError: it is longer than ``limit`` bytes, or as :meth:`ObjectStore.read_into`.
    """
    info = store.head(uri)
    if info.size > limit:
        raise StoreError(f"{uri} is {info.size} bytes long, more than the {limit} that were expected at most")
    return bytes(read_range(store, uri, 0, info.size, info.etag))
