"""Both ends of what is measured: Ceph's gateway, moto and a server that costs next to nothing; plain clients."""

from __future__ import annotations

import contextlib
import http.client
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
from botocore.config import Config

from workers.store import StoreSettings

MIB = 1 << 20
BUCKET, KEY = "bench", "object"


class KeptConnections:
    """Plain connections that are used again."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._free: list[http.client.HTTPConnection] = []

    @contextlib.contextmanager
    def one(self) -> Iterator[http.client.HTTPConnection]:
        """A connection that nobody else uses meanwhile."""
        connection = self._free.pop() if self._free else http.client.HTTPConnection(self._host, timeout=60)
        yield connection
        self._free.append(connection)

    def close(self) -> None:
        """Close them all."""
        for connection in self._free:
            connection.close()


def make_client(settings: StoreSettings, **changes: Any) -> Any:
    """A boto3 client that does what ours does, unless ``changes`` say otherwise."""
    options = {"addressing_style": "path"} | changes
    config = Config(
        signature_version="s3v4",
        max_pool_connections=32,
        s3=options,  # type: ignore[arg-type]
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    secret = settings.s3_secret_access_key
    return boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        region_name=settings.s3_region,
        aws_access_key_id=settings.s3_access_key_id,
        aws_secret_access_key=secret.get_secret_value() if secret else None,
        config=config,
    )


def make_object(client: Any, nbytes: int) -> str:
    """A bucket with one object of that size; its ETag."""
    client.create_bucket(Bucket=BUCKET)
    names = {"Bucket": BUCKET, "Key": KEY}
    upload = client.create_multipart_upload(**names)["UploadId"]
    parts = []
    for number, start in enumerate(range(0, nbytes, 64 * MIB), 1):
        body = os.urandom(MIB) * (min(64 * MIB, nbytes - start) // MIB)
        etag = client.upload_part(**names, UploadId=upload, PartNumber=number, Body=body)["ETag"]
        parts.append({"PartNumber": number, "ETag": etag})
    client.complete_multipart_upload(**names, UploadId=upload, MultipartUpload={"Parts": parts})
    return str(client.head_object(**names)["ETag"])


class CopyingReader(io.RawIOBase):
    """A file over a buffer, as the standard library makes them: each read copies."""

    def __init__(self, view: memoryview) -> None:
        self._of, self._at = view, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where it is."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._of)}[whence]
        return self._at

    def readinto(self, target: Any) -> int:
        """Copy."""
        piece = self._of[self._at : self._at + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def settings_for(url: str, key: str = "test", secret: str = "test") -> StoreSettings:  # noqa: S107
    """How to reach a server on loopback."""
    return StoreSettings.model_validate(
        {
            "s3_endpoint_url": url,
            "s3_region": "us-east-1",
            "s3_access_key_id": key,
            "s3_secret_access_key": secret,
            "s3_addressing_style": "path",
        }
    )


@contextlib.contextmanager
def rgw_server() -> Iterator[StoreSettings]:
    """A Ceph gateway."""
    from tests.servers.rgw import start_rgw  # noqa: PLC0415 - only where it is wanted

    with start_rgw() as rgw:
        yield settings_for(rgw.endpoint_url, rgw.access_key, rgw.secret_key)


@contextlib.contextmanager
def child_server(*command: str) -> Iterator[StoreSettings]:
    """A server in a process of its own that takes a port as its last argument."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen(
        [sys.executable, *command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as child:
        try:
            deadline = time.monotonic() + 60
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                if child.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{' '.join(command)} did not come up")
                time.sleep(0.05)
            yield settings_for(f"http://127.0.0.1:{port}")
        finally:
            child.kill()


class BareHandler(BaseHTTPRequestHandler):
    """Answers as S3 would, from one buffer, without looking."""

    protocol_version = "HTTP/1.1"
    buffer = memoryview(bytearray())
    sink = memoryview(bytearray(MIB))

    def do_GET(self) -> None:
        """Send a range."""
        first, _, last = self.headers["Range"].partition("=")[2].partition("-")
        count = int(last) + 1 - int(first)
        self._answer(206, count, {"Content-Range": f"bytes {first}-{last}/*"})
        self.wfile.write(self.buffer[:count])

    def do_HEAD(self) -> None:
        """Say anything."""
        self._answer(200, 0, {})

    def do_PUT(self) -> None:
        """Take a body."""
        left = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Expect"):
            self.send_response_only(100)
            self.end_headers()
        while left:
            left -= self.rfile.readinto(self.sink[:left])
        crc = self.headers.get("x-amz-checksum-crc32")
        self._answer(200, 0, {"x-amz-checksum-crc32": crc} if crc else {})

    def do_POST(self) -> None:
        """Open or complete an upload."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = b"<Result><UploadId>u</UploadId><ETag>e</ETag></Result>"
        self._answer(200, len(answer), {})
        self.wfile.write(answer)

    def _answer(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in ({"ETag": '"e"', "Content-Length": str(length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    do_DELETE = do_HEAD  # noqa: N815 - the library's names


def serve_bare(port: int) -> None:
    """Run the bare server until killed."""
    BareHandler.buffer = memoryview(bytearray(os.urandom(MIB)) * 64)
    ThreadingHTTPServer(("127.0.0.1", port), BareHandler).serve_forever()


SERVERS: dict[str, Callable[[], contextlib.AbstractContextManager[StoreSettings]]] = {
    "rgw": rgw_server,
    "moto": lambda: child_server("-m", "moto.server", "-H", "127.0.0.1", "-p"),
    "bare": lambda: child_server(
        "-c", "import sys; from benchmarks.store_servers import serve_bare; serve_bare(int(sys.argv[1]))"
    ),
}
