"""What is known about the bytes of an input before they are read: the block digests of what Mergemill made.

A ranged read carries no checksum, so a bit that flips on its way would be merged like any other. ``mergemill.json``
has the SHA-256 of each MiB of each tensor; it speaks for the weights beside it as long as all of these carry, as
their metadata, the digest of the plan that it tells about: whoever writes one of them anew with something else
leaves that out. Directories keep no metadata, and their bytes travel no way that is not checked by somebody else.
"""

from __future__ import annotations

import base64
import binascii
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from service.planning.checkpoint import (
    MAX_CONFIG_BYTES,
    MAX_CONFIG_VALUES,
    PLAN_METADATA,
    Checkpoint,
    StoredTensor,
)
from workers.errors import StoreError, StoreUnavailableError
from workers.json_text import load
from workers.store.base import ObjectInfo, ObjectStore
from workers.store.stores import read_range
from workers.task import BLOCK_BYTES, JSONValue, TensorRef, block_count

_DIGEST_BYTES: Final = 32


def blocks_of(
    store: ObjectStore,
    manifest: ObjectInfo | None,
    weights: Sequence[ObjectInfo],
    tensors: Mapping[str, StoredTensor],
) -> dict[TensorRef, bytes]:
    """The SHA-256 of each block of each tensor, one after the other, as far as they are known.

    :param manifest: the ``mergemill.json`` beside the weights, if there is one.
    :param weights: the weight files, with their metadata.
    :raises StoreUnavailableError: the store is out of reach.
    """
    plans = {info.metadata.get(PLAN_METADATA) for info in weights}
    if manifest is None or len(plans) != 1 or None in plans or manifest.size > MAX_CONFIG_BYTES:
        return {}
    try:
        text = bytes(read_range(store, manifest.uri, 0, manifest.size, manifest.etag))
        document = load(text, MAX_CONFIG_VALUES)
    except StoreUnavailableError:
        raise
    except (StoreError, ValueError):
        return {}  # it is no part of the model: what it does not tell is not known
    told = (
        document.get("blocks")
        if isinstance(document, dict) and document.get("plan_digest") in plans
        else None
    )
    if not isinstance(told, dict):
        return {}
    decoded = ((tensor.ref, _decoded(told.get(name))) for name, tensor in tensors.items())
    return {ref: each for ref, each in decoded if len(each) == _DIGEST_BYTES * block_count(ref.nbytes)}


def written(blocks: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Block digests, in hex, by tensor, as ``mergemill.json`` has them: base64, a third shorter."""
    return {name: base64.b64encode(bytes.fromhex("".join(own))).decode() for name, own in blocks.items()}


class KnownDigests:
    """The block digests of all inputs of a job, for the ranges that its tasks read."""

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        found = {ref: digests for checkpoint in checkpoints for ref, digests in checkpoint.blocks.items()}
        self._known = sorted(found.items(), key=_beginning)

    def of(self, refs: Iterable[TensorRef]) -> list[JSONValue]:
        """``[uri, start, end, digests in base64]`` of those ranges that are known.

        They begin and end with a block, or with their tensor. Only where a tensor is read in several parts, for a
        wider dtype, they may not; these are not told.
        """
        if not self._known:
            return []
        told = {}
        for ref in refs:
            if digests := self._digests(ref):
                told[ref.uri, ref.start, ref.end] = base64.b64encode(digests).decode()
        return [[*where, digests] for where, digests in told.items()]

    def _digests(self, ref: TensorRef) -> bytes:
        at = bisect_right(self._known, (ref.uri, ref.start), key=_beginning) - 1
        if at < 0 or not ref.nbytes:
            return b""
        tensor, digests = self._known[at]
        if replace(tensor, start=ref.start, end=ref.end) != ref or ref.end > tensor.end:
            return b""
        first, last = ref.start - tensor.start, ref.end - tensor.start
        if first % BLOCK_BYTES or (last % BLOCK_BYTES and ref.end != tensor.end):
            return b""
        return digests[_DIGEST_BYTES * (first // BLOCK_BYTES) : _DIGEST_BYTES * block_count(last)]


def _beginning(known: tuple[TensorRef, bytes]) -> tuple[str, int]:
    return known[0].uri, known[0].start


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except binascii.Error:
        return b""
