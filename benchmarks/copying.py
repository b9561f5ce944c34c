"""The plain copy that a merge is measured against: ``python -m benchmarks.copying REQUEST REPLY``.

It reads every byte that the merge reads, once, and writes as many as the merge writes, through the same store:

- files: into one small buffer a process, reused, from the page cache or the disk, and out of it into a file
  whose space is reserved; after every part ``fdatasync``, at the end ``fsync`` of the file and its directory,
  as the merge does. No lock, no record, no checksum.
- S3: with Mergemill's own client, ranges read in parallel, multipart uploads with the same checksums; twice as
  many parts at once as there are cores, so that some are read while others are sent.

The clock starts when every process is there and connected.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

PART_BYTES = 64 << 20
"""Bytes of one unit of work: what the merge uploads at once by default."""

BUFFER_BYTES = 1 << 20
"""Small enough to stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class Part:
    """A byte range of one file, in all models."""

    sources: tuple[str, ...]
    """The file in every model: a path, or a URI."""
    target: str
    """Where the last one's bytes go."""
    start: int
    """First byte."""
    end: int
    """One past the last byte."""
    number: int
    """Part number of the upload, from 1."""
    upload: str = ""
    """Id of the upload."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to copy."""

    sources: tuple[tuple[str, ...], ...]
    """For every file its places, one for each model, all of one size."""
    sizes: tuple[int, ...]
    """Length of every file, in bytes."""
    targets: tuple[str, ...]
    """Where each file's bytes go."""
    processes: int
    """How many copy at once."""
    store: dict[str, Any] | None = None
    """Settings of the object store; ``None`` for plain files."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What it took."""

    wall_s: float
    """Seconds from the first read to the last byte being durable."""
    cpu_s: float
    """CPU seconds of all processes in that time."""


def parts_of(sources: tuple[str, ...], target: str, size: int, part_bytes: int = PART_BYTES) -> list[Part]:
    """The parts of one file."""
    starts = range(0, size, part_bytes)
    return [
        Part(sources, target, start, min(start + part_bytes, size), number)
        for number, start in enumerate(starts, start=1)
    ]


def copy(request: Request) -> Reply:
    """Copy."""
    is_local = request.store is None
    with get_context("fork").Pool(request.processes, _connect, (request,)) as pool:
        pool.map(_idle, range(request.processes), chunksize=1)
        _connect(request)
        begun, used = time.perf_counter(), time.process_time()
        cpu_s = copy_files(request, pool.imap) if is_local else copy_objects(request, pool.imap)
        return Reply(time.perf_counter() - begun, cpu_s + time.process_time() - used)


Map = Callable[[Callable[[Part], tuple[float, Any]], list[Part]], Iterable[tuple[float, Any]]]


def copy_files(request: Request, run: Map) -> float:
    """Copy between files; the processes' CPU seconds."""
    parts = []
    for sources, size, target in zip(request.sources, request.sizes, request.targets, strict=True):
        fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        os.posix_fallocate(fd, 0, size)
        os.close(fd)
        parts += parts_of(sources, target, size)
    used = sum(seconds for seconds, _ in run(copy_file_part, parts))
    for path in (*request.targets, *{str(Path(target).parent) for target in request.targets}):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    return used


def copy_file_part(part: Part) -> tuple[float, None]:
    """Copy one part between files; its CPU seconds."""
    begun = time.process_time()
    buffer = _buffer(BUFFER_BYTES)
    inputs = [os.open(source, os.O_RDONLY) for source in part.sources]
    output = os.open(part.target, os.O_WRONLY)
    try:
        at = part.start
        while at < part.end:
            view = buffer[: part.end - at]
            for fd in inputs:
                if os.preadv(fd, [view], at) != len(view):
                    raise OSError(f"{part.sources} changed")
            written = os.pwrite(output, view, at)
            at += written
        os.fdatasync(output)
    finally:
        for fd in (*inputs, output):
            os.close(fd)
    return time.process_time() - begun, None


def copy_objects(request: Request, run: Map) -> float:
    """Copy between objects; the processes' CPU seconds."""
    from workers.store.base import Upload  # noqa: PLC0415 - a copy of files needs none of it

    store = _store(json.dumps(request.store))
    parts: list[Part] = []
    for sources, size, target in zip(request.sources, request.sizes, request.targets, strict=True):
        upload = store.open_upload(target, size, {}).id
        parts += [
            Part(part.sources, part.target, part.start, part.end, part.number, upload)
            for part in parts_of(sources, target, size)
        ]
    done: dict[str, list[Any]] = {}
    used = 0.0
    for part, (seconds, uploaded) in zip(parts, run(copy_object_part, parts), strict=True):
        done.setdefault(part.target, []).append(uploaded)
        used += seconds
    for part in parts:
        if part.number == 1:
            store.complete(Upload(part.target, part.upload), done[part.target])
    return used


def copy_object_part(part: Part) -> tuple[float, Any]:
    """Copy one part between objects; its CPU seconds and what was uploaded."""
    from workers.store.base import Upload  # noqa: PLC0415 - as above

    begun = time.process_time()
    store = _store(_settings[0])
    view = _buffer(PART_BYTES)[: part.end - part.start]
    for source in part.sources:
        store.read_into(source, part.start, view, _etag(source))
    uploaded = store.put_part(Upload(part.target, part.upload), part.number, part.start, view)
    return time.process_time() - begun, uploaded


_settings: list[str] = []


def _connect(request: Request) -> None:
    if request.store is not None:
        _settings.append(json.dumps(request.store))
        for source in {source for sources in request.sources for source in sources}:
            _etag(source)
    _buffer(BUFFER_BYTES if request.store is None else PART_BYTES)


def _idle(number: int) -> int:
    return number


@cache
def _buffer(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


@cache
def _etag(uri: str) -> str:
    return str(_store(_settings[0]).head(uri).etag)


@cache
def _store(settings: str) -> Any:
    from workers.store import StoreSettings, open_stores  # noqa: PLC0415 - as above

    return open_stores(StoreSettings.model_validate_json(settings))


def main(request_path: str, reply_path: str) -> None:
    """Do what a file asks for, and write what it took to another."""
    body = json.loads(Path(request_path).read_text())
    body["sources"] = tuple(map(tuple, body["sources"]))
    Path(reply_path).write_text(json.dumps(asdict(copy(Request(**body)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
