"""Copying where no store can do it alone."""

from __future__ import annotations

from workers.store.base import ObjectStore, Upload, UploadedPart


def copy_through(
    reader: ObjectStore,
    writer: ObjectStore,
    upload: Upload,
    number: int,
    offset: int,
    source: str,
    start: int,
    end: int,
    etag: str,
) -> UploadedPart:
    """What ``copy_part`` does where no store can: read the bytes and send them; needs the memory."""
    data = memoryview(bytearray(end - start))
    reader.read_into(source, start, data, etag)
    return writer.put_part(upload, number, offset, data)
