"""Bytes on their way to and from S3: bodies, buffers and checksum headers."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import zlib
from typing import Any

from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

from workers.store.base import Buffer


def body(data: Buffer) -> Any:
    """What boto3 can send without a copy of it: it takes no memoryview."""
    return data if isinstance(data, bytes) else _Pieces(memoryview(data).cast("B"))


def fill(view: memoryview, body: Any) -> None:
    """Read boto3's ``body``, which holds as many bytes, into ``view``, and give the connection back.

    urllib3's ``readinto`` reads into memory of its own first; the response of the standard library below it
    receives from the socket into ``view``. Where there is none, what boto3 offers does as well.

    :raises IncompleteReadError: it ended before.
    :raises ReadTimeoutError: no byte came for as long as the connection waits.
    :raises ResponseStreamingError: the connection broke.
    """
    with body as response:
        below = getattr(response, "_fp", None)
        source = below if isinstance(below, http.client.HTTPResponse) else body
        done = 0
        try:
            while done < len(view):
                got = source.readinto(view[done:])
                if not got:
                    raise IncompleteReadError(actual_bytes=done, expected_bytes=len(view))
                done += got
        except TimeoutError as error:
            raise ReadTimeoutError(endpoint_url="the store", error=error) from error
        except (OSError, http.client.HTTPException) as error:
            raise ResponseStreamingError(error=error) from error
        response.release_conn()


def spans(size: int, longest: int) -> list[slice]:
    """As few slices of ``size`` bytes as are at most ``longest`` each, all about equally long."""
    count = -(-size // longest)
    return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]


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


class _Pieces:
    """A file over a buffer whose ``read`` gives pieces of the buffer itself: hashed and sent, never copied."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    def __len__(self) -> int:
        return len(self._view)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self)}[whence]
        return self._at

    def read(self, size: int | None = -1) -> memoryview:
        start, left = self._at, len(self) - self._at
        self._at += left if size is None or size < 0 else min(size, left)
        return self._view[start : self._at]
