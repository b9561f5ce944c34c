"""The object store as Mergemill needs it: objects by URI, ranges into buffers, multipart uploads.

Stores know bytes and names, never tensors. Every store passes ``tests/workers/store/contract.py``.
"""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """What ``HEAD`` tells about an object."""

    uri: str
    """Full URI of the object."""
    size: int
    """Length in bytes."""
    etag: str
    """Opaque version tag, without quotes; changes whenever the content changes."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """User metadata, lower-case keys."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An open multipart upload."""

    uri: str
    """The object that it will become."""
    id: str
    """The store's name for it."""


@dataclass(frozen=True, slots=True)
class UploadedPart:
    """A part that the store holds for an open upload."""

    number: int
    """Part number, from 1."""
    size: int
    """Length in bytes."""
    etag: str
    """The store's tag for the part, without quotes."""


class ObjectStore(Protocol):
    """Objects under URIs. All methods raise :class:`workers.errors.StoreError` and nothing else.

    Transient failures are retried inside, with backoff and jitter, a bounded number of times. A store
    pickles, and the copy works.

    Changes, which are :meth:`put`, :meth:`put_if_absent`, :meth:`delete`, :meth:`open_upload`, :meth:`complete` and
    :meth:`abort`, ask for permission within :func:`workers.store.fence.fenced`, raise what it raises, and have no
    effect once it has ended.
    """

    def head(self, uri: str) -> ObjectInfo:
        """Look an object up.

        :raises ObjectNotFoundError: there is none.
        """
        ...

    def read_into(self, uri: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        """Fill ``buffer`` with the object's bytes from ``start``.

        :raises ObjectChangedError: ``etag`` is given and is not the object's.
        :raises TruncatedReadError: the object ends before the buffer is full.
        """
        ...

    def put(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """Write a small object whole, atomically and durably, over what is there."""
        ...

    def put_if_absent(self, uri: str, data: Buffer, metadata: Mapping[str, str] | None = None) -> ObjectInfo:
        """As :meth:`put`, but only where nothing is; of several at once exactly one wins.

        :raises AlreadyExistsError: something is there, and stays.
        """
        ...

    def delete(self, uri: str) -> None:
        """Remove an object; it is no error when there is none."""
        ...

    def check_writable(self, uri: str) -> None:
        """Find out whether an object could be put here, and leave nothing behind.

        :raises AccessDeniedError: these credentials may not.
        """
        ...

    def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
        """All objects whose URI begins with ``prefix`` (a plain string), in the order of their names.

        :param beside: only those without another slash after ``prefix``; what lies deeper costs nothing then.
        """
        ...

    def presign(self, uri: str, expires_s: int) -> str | None:
        """A URL that reads the object without credentials for ``expires_s`` seconds, or ``None``."""
        ...

    def open_upload(self, uri: str, size: int, metadata: Mapping[str, str]) -> Upload:
        """Begin a multipart upload that will become ``uri``, ``size`` bytes long."""
        ...

    def put_part(self, upload: Upload, number: int, offset: int, data: Buffer) -> UploadedPart:
        """Upload a part durably, with a checksum that the store verifies; the same number again replaces it.

        :raises UploadNotFoundError: the upload is gone.
        """
        ...

    def copy_part(
        self, upload: Upload, number: int, offset: int, source: str, start: int, end: int, etag: str
    ) -> UploadedPart:
        """As :meth:`put_part`, with bytes ``[start, end)`` of another object, copied inside the store.

        :raises ObjectChangedError: ``etag`` is not the source's.
        :raises UploadNotFoundError: the upload is gone.
        """
        ...

    def list_parts(self, upload: Upload) -> builtins.list[UploadedPart]:
        """The parts that the store holds, by number.

        :raises UploadNotFoundError: the upload is gone.
        """
        ...

    def list_uploads(self, uri: str) -> builtins.list[Upload]:
        """The open uploads for exactly this object."""
        ...

    def uploads_below(self, prefix: str) -> builtins.list[tuple[Upload, float]]:
        """The open uploads for objects beside each other in ``prefix``, and when each was opened, in Unix seconds."""
        ...

    def complete(self, upload: Upload, parts: Sequence[UploadedPart]) -> None:
        """Make the object of these parts, at once, over what is there.

        :raises UploadNotFoundError: the upload is gone (it may have been completed by a lost request).
        :raises InvalidPartError: a part is missing or has another ETag.
        """
        ...

    def abort(self, upload: Upload) -> None:
        """Give up an upload and its parts; it is no error when it is gone."""
        ...
