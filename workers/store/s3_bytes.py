"""Bytes on their way to and from S3: bodies, buffers and checksum headers."""

from __future__ import annotations

import base64
import hashlib
import io
import zlib
from typing import Any

from botocore.exceptions import IncompleteReadError

from workers.store.base import Buffer

_STEP_BYTES = 1 << 20


def body(data: Buffer) -> Any:
    """What boto3 can send: it takes no memoryview, and a copy would double a worker's memory."""
    return data if isinstance(data, bytes | bytearray) else _Reader(data.cast("B"))


def fill(view: memoryview, stream: Any) -> None:
    """Read ``stream`` until ``view`` is full.

    :raises IncompleteReadError: it ended before.
    """
    done = 0
    while done < len(view):
        got = stream.readinto(view[done : done + _STEP_BYTES])
        if not got:
            raise IncompleteReadError(actual_bytes=done, expected_bytes=len(view))
        done += got


def crc32_header(view: memoryview) -> dict[str, str]:
    """The CRC-32 as boto3 takes and returns it."""
    return {"ChecksumCRC32": _base64(zlib.crc32(view).to_bytes(4, "big"))}


def md5_header(view: memoryview) -> dict[str, str]:
    """The MD5 as boto3 takes it."""
    return {"ContentMD5": _base64(md5(view))}


def md5(view: memoryview) -> bytes:
    """The MD5, which is a part's ETag unless the store encrypts with keys of its own."""
    return hashlib.md5(view, usedforsecurity=False).digest()


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


class _Reader(io.RawIOBase):
    """A file over a buffer, without a copy of it."""

    def __init__(self, view: memoryview) -> None:
        self._file_view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self._file_view)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._file_view)}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, target: Any) -> int:
        piece = self._file_view[self._at : self._at + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
