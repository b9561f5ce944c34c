"""Where inputs and outputs are: directories, or buckets of a real S3 server that is started for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.groups import Group, group
from benchmarks.inputs import INDEX, Inputs
from benchmarks.transfer import bucket_client, upload
from tests.servers.rgw import INSTALL_HINT, RGW, missing_binaries, start_rgw
from workers.errors import ObjectNotFoundError
from workers.store import ObjectStore, StoreSettings, from_path, join, open_stores, read_bytes, read_range

FILES = "files"
S3 = "s3"
STORES = (FILES, S3)

SINGLE = "model.safetensors"
BUCKET = "bench"
_HASH_BYTES = 16 << 20
_HEADROOM = 1.5
"""How much more than it will hold the S3 server is made for: deleted objects go after some seconds."""


@dataclass(frozen=True)
class Place:
    """A store with the inputs in it."""

    name: str
    """``files`` or ``s3``."""
    inputs: Inputs
    """The inputs, as they are on this machine's disk."""
    root: str
    """URI of the directory or bucket of the outputs."""
    above: str
    """URI of what holds a directory of models for every size."""
    settings: Mapping[str, Any] | None = None
    """Settings of the S3 store, as plain JSON."""
    server: Group | None = None
    """The S3 server's processes."""
    store: ObjectStore = field(default_factory=lambda: open_stores(StoreSettings()))
    """For looking at what was made."""

    def model(self, name: str) -> str:
        """URI of a model."""
        return join(self.above, self.inputs.size.name, name)

    def output(self, name: str) -> str:
        """URI of an output."""
        return join(self.root, name)

    @property
    def environment(self) -> dict[str, str]:
        """What has Mergemill reach the store."""
        return {
            f"MERGEMILL_STORE__{name.upper()}": str(value) for name, value in (self.settings or {}).items()
        }

    def clear(self, output: str) -> None:
        """Remove an output."""
        for info in list(self.store.list(output + "/")):
            self.store.delete(info.uri)
        if self.name == FILES:
            shutil.rmtree(output.removeprefix("file://"), ignore_errors=True)

    def prepare(self, output: str, models: tuple[str, ...]) -> None:
        """The state that every timed run begins in: no output, nothing left to write back, inputs warm (or cold)."""
        self.clear(output)
        os.sync()
        if self.name == FILES:
            self.inputs.warm(models)


def shard_names(store: ObjectStore, checkpoint: str) -> dict[str, str]:
    """The file that holds each tensor; a checkpoint of one file may have no index."""
    try:
        found: dict[str, str] = json.loads(read_bytes(store, join(checkpoint, INDEX)))["weight_map"]
    except ObjectNotFoundError:
        header, _ = _header(store, join(checkpoint, SINGLE))
        return dict.fromkeys(header, SINGLE)
    return found


def _header(store: ObjectStore, uri: str) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begins."""
    (length,) = struct.unpack("<Q", read_range(store, uri, 0, 8))
    return json.loads(read_range(store, uri, 8, 8 + length)), 8 + length


def digest(store: ObjectStore, checkpoint: str) -> str:
    """SHA-256 over the names and bytes of all shards, as they lie in the store."""
    whole = hashlib.sha256()
    for name in sorted(set(shard_names(store, checkpoint).values())):
        uri = join(checkpoint, name)
        info = store.head(uri)
        hashed = hashlib.sha256()
        for start in range(0, info.size, _HASH_BYTES):
            buffer = bytearray(min(_HASH_BYTES, info.size - start))
            store.read_into(uri, start, memoryview(buffer), info.etag)
            hashed.update(buffer)
        whole.update(f"{name} {hashed.hexdigest()}\n".encode())
    return whole.hexdigest()


def read_tensor(store: ObjectStore, checkpoint: str, name: str) -> torch.Tensor:
    """One bfloat16 tensor, in float64."""
    uri = join(checkpoint, shard_names(store, checkpoint)[name])
    header, data_start = _header(store, uri)
    entry = header[name]
    start, end = entry["data_offsets"]
    if entry["dtype"] != "BF16":
        raise ValueError(f"{name} of {checkpoint} is {entry['dtype']}, not BF16")
    data = bytearray(read_range(store, uri, data_start + start, data_start + end))
    return torch.frombuffer(data, dtype=torch.bfloat16).double().view(entry["shape"])


@contextlib.contextmanager
def files(inputs: Sequence[Inputs], scratch: Path) -> Iterator[Place]:
    """Inputs and outputs in directories."""
    scratch.mkdir(parents=True, exist_ok=True)
    yield Place(FILES, inputs[0], from_path(str(scratch)), from_path(str(inputs[0].root.parent)))


@contextlib.contextmanager
def s3(inputs: Sequence[Inputs]) -> Iterator[Place]:
    """Inputs and outputs on a Ceph gateway, which keeps them in memory.

    :raises SystemExit: Ceph is not installed.
    """
    if missing := missing_binaries():
        raise SystemExit(f"STORES=s3 needs {', '.join(missing)}: {INSTALL_HINT}")
    held = sum(each.nbytes(each.size.models) + 2 * each.nbytes(each.size.models[:1]) for each in inputs)
    with group(S3) as processes, start_rgw(int(held * _HEADROOM) + (1 << 30)) as server:
        for process in server.processes:
            processes.adopt(process.pid)
        settings = _settings(server)
        bucket_client(settings).create_bucket(Bucket=BUCKET)
        store = open_stores(StoreSettings(**settings))
        found = Place(S3, inputs[0], f"s3://{BUCKET}/outputs", f"s3://{BUCKET}", settings, processes, store)
        for each in inputs:
            for model in each.size.models:
                upload(settings, each.directory(model), replace(found, inputs=each).model(model))
        yield found
        store.close()


def _settings(server: RGW) -> dict[str, Any]:
    """Ceph 16 ignores CRC32 checksums and verifies Content-MD5: ``when_required``."""
    return {
        "s3_endpoint_url": server.endpoint_url,
        "s3_region": "us-east-1",
        "s3_access_key_id": server.access_key,
        "s3_secret_access_key": server.secret_key,
        "s3_addressing_style": "path",
        "s3_checksums": "when_required",
    }


def place(name: str, inputs: Sequence[Inputs], scratch: Path) -> contextlib.AbstractContextManager[Place]:
    """The place of a name, with these inputs; the first are those that it is about."""
    return s3(inputs) if name == S3 else files(inputs, scratch)
