"""Models in S3 whose bytes are known, as those are that Mergemill made; and flips of nothing but such bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from service.planning.checkpoint import MANIFEST_FILE, PLAN_METADATA
from service.planning.known_digests import written
from tests.chaos.faults import Fault, Kind, Policy, Request
from workers.safetensors_format import LENGTH_BYTES, Header, header_length, parse
from workers.store import join
from workers.store.base import ObjectStore
from workers.task import BLOCK_BYTES

_RANGE: Final = re.compile(r"bytes=(\d+)-(\d+)")


def put_known(store: ObjectStore, uri: str, directory: Path) -> None:
    """Write a checkpoint to a store, with what tells the digests of its blocks."""
    weights = sorted(directory.glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    blocks: dict[str, list[str]] = {}
    for path in weights:
        data = path.read_bytes()
        header = header_of(data)
        for entry in header.entries:
            tensor = data[header.data_start + entry.start : header.data_start + entry.end]
            starts = range(0, len(tensor), BLOCK_BYTES)
            blocks[entry.name] = [
                hashlib.sha256(tensor[start : start + BLOCK_BYTES]).hexdigest() for start in starts
            ]
    for path in sorted(directory.iterdir()):
        metadata = {PLAN_METADATA: digest} if path in weights else None
        store.put(join(uri, path.name), path.read_bytes(), metadata)
    manifest = {"plan_digest": digest, "blocks": written(blocks)}
    store.put(join(uri, MANIFEST_FILE), json.dumps(manifest).encode())


def header_of(data: bytes) -> Header:
    """The header of a whole file."""
    length = header_length(data[:LENGTH_BYTES], len(data))
    return parse(data[LENGTH_BYTES : LENGTH_BYTES + length], len(data))


@dataclass
class OfKnown:
    """Another policy's flips of reads, as far as a digest tells of them, and each byte's once.

    What is read again is read as it is: two flips of one block in a row are one too many for anybody.
    """

    policy: Policy
    """The other policy."""
    begins: Mapping[str, int]
    """Where, of each object whose bytes are known, by key, these begin: a header is not."""
    flipped: list[tuple[str, int, int]] = field(default_factory=list)
    """Key, beginning and end of what was read with a flip."""

    def decide(self, request: Request) -> Fault | None:
        """See :meth:`tests.chaos.faults.Policy.decide`."""
        asked = _RANGE.fullmatch(request.headers.get("range", ""))
        if request.method != "GET" or asked is None or request.key not in self.begins:
            return None
        first, last = int(asked[1]), int(asked[2])
        again = any(key == request.key and first < end and begin <= last for key, begin, end in self.flipped)
        if again or first < self.begins[request.key]:
            return None
        fault = self.policy.decide(request)
        if fault is not None and fault.kind == Kind.FLIP:
            self.flipped.append((request.key, first, last + 1))
        return fault
