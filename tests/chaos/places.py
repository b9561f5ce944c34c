"""Where models and outputs lie: a directory, or a bucket of an S3 server; and what is really there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import SecretStr

from tests.chaos import inputs
from tests.chaos.credentials import Key
from tests.servers.rgw import RGW, start_rgw
from tests.servers.rgw_fixtures import client_of
from workers.store import StoreSettings, open_stores
from workers.store.base import ObjectStore
from workers.store.uris import to_path

ENDPOINT = "MERGEMILL_CHAOS_S3"
"""Variable that names an S3 server that runs: ``<url> <access key id> <secret access key>``, and another
key of the same user, if it has one."""


@dataclass(frozen=True)
class Place:
    """A store with the models in it, as everybody may reach it who is not disturbed."""

    root: str
    """URI below which all lies."""
    settings: StoreSettings
    """How it is reached."""
    store: ObjectStore
    """It."""
    keys: tuple[Key, ...] = ()
    """Keys that it may be reached with, as good as those in ``settings``, which are the first."""
    begins: Mapping[str, int] = field(default_factory=dict)
    """Where the bytes begin, of each object of the models, by key, that digests are known of."""

    def digests(self, output: str) -> dict[str, str]:
        """SHA-256 by name of all that is at an output, seen without any code of ours where there is some to hide it."""
        if self.settings.s3_endpoint_url is not None:
            return inputs.digests(self.store, output)
        directory = Path(to_path(output))
        files = (path for path in directory.rglob("*") if path.is_file())
        return {
            str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }

    def uploads(self, prefix: str) -> list[str]:
        """Multipart uploads that are open below a prefix."""
        if self.settings.s3_endpoint_url is None:
            return [str(path) for path in Path(to_path(prefix)).glob("**/.mergemill/uploads/*")]
        bucket, _, beginning = prefix.removeprefix("s3://").partition("/")
        with client_of(self.settings) as client:
            found = client.list_multipart_uploads(Bucket=bucket, Prefix=f"{beginning}/").get("Uploads", [])
        return [f"{each.get('Key')} {each.get('UploadId')}" for each in found]


@contextlib.contextmanager
def place(kind: str) -> Iterator[Place]:
    """A place for a whole invocation: ``files`` or ``s3``."""
    keys: tuple[Key, ...] = ()
    with contextlib.ExitStack() as stack:
        if kind == "files":
            directory = tempfile.mkdtemp(prefix="chaos-")
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            settings, root = StoreSettings(), f"file://{directory}"
        else:
            given = os.environ.get(ENDPOINT, "").split()
            if not given:
                rgw = stack.enter_context(start_rgw())
                given = [rgw.endpoint_url, rgw.access_key, rgw.secret_key, *_another_key(rgw)]
            keys = ((given[1], given[2]), *([(given[3], given[4])] if len(given) > 4 else []))
            settings = StoreSettings(
                s3_endpoint_url=given[0],
                s3_region="us-east-1",
                s3_access_key_id=given[1],
                s3_secret_access_key=SecretStr(given[2]),
                s3_addressing_style="path",
                s3_checksums="when_required",
            )
            root = f"s3://chaos-{uuid.uuid4().hex[:12]}"
            with client_of(settings) as client:
                client.create_bucket(Bucket=root.removeprefix("s3://"))
        store = open_stores(settings)
        inputs.write_models(store, root, known=bool(keys))
        yield Place(root, settings, store, keys, inputs.data_begins(store, root) if keys else {})


def _another_key(rgw: RGW) -> Key:
    """Another key of the gateway's user."""
    key = secrets.token_hex(10).upper(), secrets.token_hex(20)
    made = [f"--access-key={key[0]}", f"--secret-key={key[1]}"]
    subprocess.run(
        ["radosgw-admin", "-c", str(rgw.directory / "ceph.conf"), "key", "create", "--uid=mergemill", *made],
        check=True,
        capture_output=True,
        timeout=60,
    )
    return key
