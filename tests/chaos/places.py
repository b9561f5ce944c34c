"""Where models and outputs lie: a directory, or a bucket of an S3 server; and what is really there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from tests.chaos import inputs
from tests.servers.rgw import start_rgw
from tests.servers.rgw_fixtures import client_of
from workers.store import StoreSettings, open_stores
from workers.store.base import ObjectStore
from workers.store.uris import to_path

ENDPOINT = "MERGEMILL_CHAOS_S3"
"""Variable that names an S3 server that runs: ``<url> <access key id> <secret access key>``."""


@dataclass(frozen=True)
class Place:
    """A store with the models in it, as everybody may reach it who is not disturbed."""

    root: str
    """URI below which all lies."""
    settings: StoreSettings
    """How it is reached."""
    store: ObjectStore
    """It."""

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
    with contextlib.ExitStack() as stack:
        if kind == "files":
            directory = tempfile.mkdtemp(prefix="chaos-")
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            settings, root = StoreSettings(), f"file://{directory}"
        else:
            given = os.environ.get(ENDPOINT, "").split()
            if not given:
                rgw = stack.enter_context(start_rgw())
                given = [rgw.endpoint_url, rgw.access_key, rgw.secret_key]
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
        made = Place(root, settings, open_stores(settings))
        inputs.write_models(made.store, root)
        yield made
