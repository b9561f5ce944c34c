"""An S3 server of moto, in a thread of this process: without Ceph's care, and there in any environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import ThreadedMotoServer

from workers.store import StoreSettings


@contextmanager
def running_moto(**settings: Any) -> Iterator[StoreSettings]:
    """How to reach a server of one's own; ``settings`` are set beside what that takes."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    reach = {
        "s3_endpoint_url": f"http://{host}:{port}",
        "s3_region": "us-east-1",
        "s3_access_key_id": "test",
        "s3_secret_access_key": "test",
        "s3_addressing_style": "path",
        "s3_retry_wait_s": 0.01,
    }
    try:
        yield StoreSettings(**(reach | settings))
    finally:
        server.stop()
