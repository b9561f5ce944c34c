"""What it costs us to move bytes to and from S3, and to files durably: CPU-seconds a GB, and GB/s.

    python -m benchmarks.store_bytes reads --server rgw
    python -m benchmarks.store_bytes uploads --server rgw
    python -m benchmarks.store_bytes files --directory /var/tmp

Every variant is run once in each of several rounds, one after the other, so that whatever else the machine does
falls on all alike; the median of the rounds is printed, and the lowest and the highest. CPU is this process's
own, user and system; the servers are other processes, and so is the system's write-back of the page cache. A GB is
10⁹ bytes. ``bare`` is a server that sends from memory and checks nothing, so that the client is what limits.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import http.client
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3

from benchmarks.store_servers import (
    BUCKET,
    KEY,
    MIB,
    SERVERS,
    CopyingReader,
    KeptConnections,
    make_client,
    make_object,
)
from workers.arena import Arena
from workers.store import ObjectStore, StoreSettings, direct, files, from_path
from workers.store.local import LocalStore
from workers.store.s3 import S3Store
from workers.store.s3_bytes import body, crc32_header, md5_header

EARLY_BYTES = 8 * MIB

Read = Callable[[int, memoryview], None]
"""Fills the view from that byte of the object."""


def main() -> None:
    """Measure one thing, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["reads", "uploads", "files"])
    parser.add_argument("--server", choices=["rgw", "moto", "bare"], default="rgw")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--mib", type=int, default=1024, help="how much each measurement moves")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranges", type=int, nargs="+", default=[8, 16], help="MiB of a range")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--parts", type=int, nargs="+", default=[16, 64], help="MiB of a part")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if options.what == "files":
            cases = file_cases(stack, options)
        else:
            settings = stack.enter_context(SERVERS[options.server]())
            cases = (read_cases if options.what == "reads" else upload_cases)(stack, settings, options)
        measure(cases, options.mib * MIB, options.rounds)


def measure(cases: dict[str, Callable[[], None]], nbytes: int, rounds: int) -> None:
    """Run the cases in turn, several times over, and print what each cost."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            case()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            found[name].append((cpu / nbytes * 1e9, wall / nbytes * 1e9))
    width = max(map(len, cases))
    say(f"{'':{width}}  CPU-s/GB (low - high)  wall-s/GB (low - high)  GB/s")
    for name, runs in found.items():
        cpus, walls = map(sorted, zip(*runs, strict=True))
        told = (f"{statistics.median(x):.3f} ({x[0]:.3f} - {x[-1]:.3f})" for x in (cpus, walls))
        say(f"{name:{width}}  {'   '.join(told)}   {1 / statistics.median(walls):.2f}")


def say(line: str) -> None:
    """Write a line of the report."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# --- reads --------------------------------------------------------------------------------------


def read_cases(  # noqa: PLR0915 - one small function for each way
    stack: contextlib.ExitStack, settings: StoreSettings, options: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    """Every way to read, with every range size and number of readers."""
    client = make_client(settings)
    stack.callback(client.close)
    etag = make_object(client, options.mib * MIB)
    buffer = memoryview(
        bytearray(os.urandom(MIB)) * options.mib
    )  # touched: page faults are not what we measure
    pool = urllib3.PoolManager(maxsize=32, retries=False)
    stack.callback(pool.clear)
    connections = KeptConnections(urlsplit(settings.s3_endpoint_url or "").netloc)
    stack.callback(connections.close)

    def url(operation: str = "get_object") -> str:
        signed: str = client.generate_presigned_url(
            operation, Params={"Bucket": BUCKET, "Key": KEY, "IfMatch": etag}, ExpiresIn=900
        )
        return signed

    def span(start: int, view: memoryview) -> str:
        return f"bytes={start}-{start + len(view) - 1}"

    def boto3_steps(start: int, view: memoryview) -> None:
        body = client.get_object(Bucket=BUCKET, Key=KEY, Range=span(start, view), IfMatch=etag)["Body"]
        for at in range(0, len(view), MIB):
            step = view[at : at + MIB]
            while step:
                step = step[body.readinto(step) :]

    def boto3_below(start: int, view: memoryview) -> None:
        body = client.get_object(Bucket=BUCKET, Key=KEY, Range=span(start, view), IfMatch=etag)["Body"]
        with body as raw:
            fill(view, raw._fp)
            raw.release_conn()

    def presigned_urllib3(start: int, view: memoryview) -> None:
        headers = {"Range": span(start, view), "If-Match": etag}
        raw = pool.request("GET", url(), headers=headers, preload_content=False)
        for at in range(0, len(view), MIB):
            step = view[at : at + MIB]
            while step:
                step = step[raw.readinto(step) :]
        raw.release_conn()

    def presigned_below(start: int, view: memoryview) -> None:
        headers = {"Range": span(start, view), "If-Match": etag}
        raw: Any = pool.request("GET", url(), headers=headers, preload_content=False)
        fill(view, raw._fp)
        raw.release_conn()

    def presigned_http(start: int, view: memoryview) -> None:
        with connections.one() as connection:
            target = url().partition("://")[2].partition("/")[2]
            connection.request("GET", "/" + target, headers={"Range": span(start, view), "If-Match": etag})
            fill(view, connection.getresponse())

    def case(read: Read, step: int, readers: int) -> Callable[[], None]:
        def run() -> None:
            with ThreadPoolExecutor(readers) as threads:
                starts = range(0, len(buffer), step)
                list(threads.map(lambda start: read(start, buffer[start : start + step]), starts))

        return run

    ways = (boto3_steps, boto3_below, presigned_urllib3, presigned_below, presigned_http)
    cases = {
        f"{read.__name__}, {mib} MiB, {readers} readers": case(read, mib * MIB, readers)
        for mib in options.ranges
        for readers in options.readers
        for read in ways
    }
    for mib in options.ranges:
        for readers in options.readers:
            changes = {"s3_read_bytes": mib * MIB, "s3_read_threads": readers}
            store = S3Store(settings.model_copy(update=changes))
            stack.callback(store.close)
            cases[f"the store, {mib} MiB, {readers} readers"] = lambda store=store: store.read_into(  # type: ignore[misc]
                f"s3://{BUCKET}/{KEY}", 0, buffer, etag
            )
    started = time.process_time()
    for _ in range(200):
        url()
    say(f"signing a URL takes {(time.process_time() - started) * 5:.2f} ms of CPU")
    return cases


def fill(view: memoryview, response: Any) -> None:
    """Read until the view is full."""
    while view:
        view = view[response.readinto(view) :]


# --- uploads ------------------------------------------------------------------------------------


def upload_cases(
    stack: contextlib.ExitStack, settings: StoreSettings, options: argparse.Namespace
) -> dict[str, Callable[[], None]]:
    """Every way to send parts; one after the other, since a server on the same machine is slower anyway."""
    signing, unsigned = make_client(settings), make_client(settings, payload_signing_enabled=False)
    for each in (signing, unsigned):
        stack.callback(each.close)
    signing.create_bucket(Bucket=BUCKET)
    buffer = memoryview(bytearray(os.urandom(MIB)) * options.mib)
    host = urlsplit(settings.s3_endpoint_url or "").netloc

    def nothing(view: memoryview) -> dict[str, str]:
        return {}

    def case(
        client: Any,
        body: Callable[[memoryview], Any],
        checksum: Callable[[memoryview], dict[str, str]],
        mib: int,
    ) -> Callable[[], None]:
        def send(names: dict[str, Any], view: memoryview) -> None:
            client.upload_part(**names, **checksum(view), Body=body(view))

        return lambda: upload(signing, buffer, mib * MIB, send)

    def send_plainly(names: dict[str, Any], view: memoryview) -> None:
        url = unsigned.generate_presigned_url("upload_part", Params=names, ExpiresIn=900)
        with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
            target = "/" + url.partition("://")[2].partition("/")[2]
            connection.request("PUT", target, body=view, headers={"Content-Length": str(len(view))})
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                raise SystemExit(f"the server answered {answer.status}")

    cases: dict[str, Callable[[], None]] = {}
    for mib in options.parts:
        cases |= {
            f"MD5 and SHA-256, copies, {mib} MiB": case(signing, CopyingReader, md5_header, mib),
            f"CRC-32 and SHA-256, copies, {mib} MiB": case(signing, CopyingReader, crc32_header, mib),
            f"SHA-256, copies, {mib} MiB": case(signing, CopyingReader, nothing, mib),
            f"SHA-256, {mib} MiB": case(signing, body, nothing, mib),
            f"CRC-32, {mib} MiB": case(unsigned, body, crc32_header, mib),
            f"MD5, {mib} MiB": case(unsigned, body, md5_header, mib),
            f"no checksum, {mib} MiB": case(unsigned, body, nothing, mib),
            f"no checksum, presigned, http.client, {mib} MiB": lambda mib=mib: upload(  # type: ignore[misc]
                signing, buffer, mib * MIB, send_plainly
            ),
        }
    store = S3Store(settings)
    stack.callback(store.close)
    for mib in options.parts:
        cases[f"the store, {mib} MiB"] = lambda mib=mib: put_parts(
            store, f"s3://{BUCKET}/{KEY}", buffer, mib * MIB
        )  # type: ignore[misc]
    return cases


def upload(
    client: Any, buffer: memoryview, step: int, send: Callable[[dict[str, Any], memoryview], None]
) -> None:
    """An upload in parts that is given up in the end, so that the server keeps nothing."""
    names = {"Bucket": BUCKET, "Key": KEY}
    names["UploadId"] = client.create_multipart_upload(**names)["UploadId"]
    for number, start in enumerate(range(0, len(buffer), step), 1):
        send({**names, "PartNumber": number}, buffer[start : start + step])
    client.abort_multipart_upload(**names)


def put_parts(store: ObjectStore, uri: str, buffer: memoryview, step: int) -> None:
    """The same through a store of ours."""
    upload = store.open_upload(uri, len(buffer), {})
    for number, start in enumerate(range(0, len(buffer), step), 1):
        store.put_part(upload, number, start, buffer[start : start + step])
    store.abort(upload)


# --- files --------------------------------------------------------------------------------------


def file_cases(stack: contextlib.ExitStack, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Every way to write parts to a file; its space is reserved and all is durable, unless the name says otherwise."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory)))
    path = directory / "data"
    size = options.mib * MIB
    buffer = Arena(size).take([size])[0].view  # begins on a page, as direct writes need it
    noise = os.urandom(MIB)
    for start in range(0, len(buffer), MIB):
        buffer[start : start + MIB] = noise
    libc = ctypes.CDLL(None, use_errno=True)

    def plain(fd: int, at: int, view: memoryview) -> None:
        files.write_at(fd, at, view)

    def directly(fd: int, at: int, view: memoryview) -> None:
        direct.write_at(path, fd, at, view)

    def by_range(fd: int, at: int, view: memoryview) -> None:
        for start in range(0, len(view), EARLY_BYTES):
            files.write_at(fd, at + start, view[start : start + EARLY_BYTES])
            where = (ctypes.c_int64(at + start), ctypes.c_int64(EARLY_BYTES))
            libc.sync_file_range(fd, *where, 2)  # SYNC_FILE_RANGE_WRITE

    def by_advice(fd: int, at: int, view: memoryview) -> None:
        for start in range(0, len(view), EARLY_BYTES):
            files.write_at(fd, at + start, view[start : start + EARLY_BYTES])
            os.posix_fadvise(fd, at + start, EARLY_BYTES, os.POSIX_FADV_DONTNEED)

    def sync_now(fd: int) -> None:
        os.fdatasync(fd)

    def sync_later(fd: int) -> None:
        """Leave it to the end."""

    def case(
        write: Callable[[int, int, memoryview], None],
        sync: Callable[[int], object],
        mib: int,
        durable: bool = True,
        reserved: bool = True,
    ) -> Callable[[], None]:
        def run() -> None:
            with files.opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL) as fd:
                if reserved:
                    os.posix_fallocate(fd, 0, len(buffer))
                for at in range(0, len(buffer), mib * MIB):
                    write(fd, at, buffer[at : at + mib * MIB])
                    sync(fd)
                if durable:
                    os.fsync(fd)
            path.unlink()

        return run

    def in_background(mib: int) -> None:
        with ThreadPoolExecutor(1) as thread:
            case(plain, lambda fd: thread.submit(os.fdatasync, os.dup(fd)), mib)()

    def through(store: ObjectStore, mib: int) -> Callable[[], None]:
        return lambda: put_parts(store, from_path(str(directory / "object")), buffer, mib * MIB)

    ours, cached = LocalStore(), LocalStore(StoreSettings(file_direct_io=False))
    cases: dict[str, Callable[[], None]] = {}
    for mib in options.parts:
        cases |= {
            f"not durable, {mib} MiB": case(plain, sync_later, mib, durable=False),
            f"synced once at the end, {mib} MiB": case(plain, sync_later, mib),
            f"synced each, {mib} MiB": case(plain, sync_now, mib),
            f"synced each, space not reserved, {mib} MiB": case(plain, sync_now, mib, reserved=False),
            f"direct, synced each, {mib} MiB": case(directly, sync_now, mib),
            f"started by sync_file_range, synced each, {mib} MiB": case(by_range, sync_now, mib),
            f"started by fadvise, synced each, {mib} MiB": case(by_advice, sync_now, mib),
            f"synced each beside the next, {mib} MiB": lambda mib=mib: in_background(mib),  # type: ignore[misc]
            f"the store without direct writes, {mib} MiB": through(cached, mib),
            f"the store, {mib} MiB": through(ours, mib),
        }
    return cases


if __name__ == "__main__":
    main()
