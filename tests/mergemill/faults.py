"""An HTTP transport that serves files, and fails as it is told to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import httpx

JOB = "merge-00000000000000000000000000"
FILES = f"/v1/merges/{JOB}/files"

Fault = Callable[[httpx.Request], httpx.Response | None]
"""What happens to one request: an answer, an exception, or ``None`` for what would have happened."""


class _Breaking(httpx.SyncByteStream):
    """Some bytes, and then the connection is gone."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __iter__(self) -> Iterator[bytes]:
        yield self._data
        raise httpx.ReadError("connection reset")


def breaks_after(count: int, files: Mapping[str, bytes]) -> Fault:
    """The answer's first ``count`` bytes, then a reset."""

    def fault(request: httpx.Request) -> httpx.Response:
        data, status = _cut(request, files)
        left = str(len(data))
        return httpx.Response(
            status, headers={"Content-Length": left}, stream=_Breaking(data[:count]), request=request
        )

    return fault


def answers(status: int) -> Fault:
    """A plain status."""
    return lambda request: httpx.Response(status, request=request)


@dataclass
class FileServer:
    """A succeeded job with files, behind ``httpx.MockTransport``."""

    files: dict[str, bytes]
    digests: dict[str, str] = field(default_factory=dict)
    """Those that are not ``sha256:`` of the bytes."""
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    """By file name, in order; then everything works."""
    ranges: bool = True
    urls: Callable[[str, int], str] = lambda name, listing: f"http://store.test/files/{name}?signed={listing}"
    """A file's URL in the n-th listing."""
    listings: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """File and Range header of every download request."""

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._handle)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == FILES:
            self.listings += 1
            listed = [
                {
                    "name": name,
                    "size": len(data),
                    "digest": self.digests.get(name, f"sha256:{hashlib.sha256(data).hexdigest()}"),
                    "url": self.urls(name, self.listings),
                }
                for name, data in self.files.items()
            ]
            return httpx.Response(200, content=json.dumps({"files": listed}))
        name = request.url.path.rpartition("/")[2]
        self.asked.append((name, request.headers.get("Range")))
        queue = self.faults.get(name, [])
        if queue and (answer := queue.pop(0)(request)) is not None:
            return answer
        data, status = _cut(request, self.files, self.ranges)
        return httpx.Response(status, content=data)


def _cut(request: httpx.Request, files: Mapping[str, bytes], ranges: bool = True) -> tuple[bytes, int]:
    data = files[request.url.path.rpartition("/")[2]]
    asked = request.headers.get("Range")
    if asked is None or not ranges:
        return data, 200
    start = int(asked.removeprefix("bytes=").removesuffix("-"))
    return data[start:], 206
