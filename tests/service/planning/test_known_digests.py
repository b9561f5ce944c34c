"""What is known about bytes before they are read: never more than was told, and never about other bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.planning.checkpoint import PLAN_METADATA, Checkpoint, StoredTensor
from service.planning.known_digests import KnownDigests, blocks_of, written
from workers.errors import CorruptReadError
from workers.inputs import Inputs
from workers.store import from_path, join
from workers.store.base import ObjectInfo
from workers.store.local import LocalStore
from workers.task import BLOCK_BYTES, TensorRef, block_count

URI = "s3://b/m/model-00001-of-00001.safetensors"
SIZES = {"a": 10, "b": 3 * BLOCK_BYTES + 100, "none": 0, "c": 2 * BLOCK_BYTES}


def tensors() -> dict[str, StoredTensor]:
    """Neighbours in a file."""
    start, found = 100, {}
    for name, size in SIZES.items():
        found[name] = StoredTensor(name, (size,), TensorRef(URI, "e", start, start + size, "U8"))
        start += size
    return found


def digests(name: str) -> list[str]:
    """Made-up digests of a tensor's blocks."""
    return [
        hashlib.sha256(f"{name} {number}".encode()).hexdigest() for number in range(block_count(SIZES[name]))
    ]


def known() -> KnownDigests:
    blocks = {tensor.ref: bytes.fromhex("".join(digests(name))) for name, tensor in tensors().items()}
    return KnownDigests([Checkpoint("s3://b/m", tensors(), None, {}, {}, blocks=blocks)])


@pytest.mark.fast
@given(
    name=st.sampled_from(sorted(SIZES)),
    first=st.integers(0, 4),
    last=st.integers(0, 4),
    shift=st.integers(-1, 1),
)
def test_ranges_of_whole_blocks_are_told_and_others_are_not(
    name: str, first: int, last: int, shift: int
) -> None:
    ref, size = tensors()[name].ref, SIZES[name]
    start, end = first * BLOCK_BYTES + shift, min(size, last * BLOCK_BYTES)
    if not 0 <= start < end:
        return
    told = known().of([TensorRef(URI, "e", ref.start + start, ref.start + end, "U8")])
    if shift:
        assert told == []
    else:
        ((uri, begin, stop, text),) = told
        assert (uri, begin, stop) == (URI, ref.start + start, ref.start + end)
        assert base64.b64decode(text).hex() == "".join(digests(name)[first : block_count(end)])


@pytest.mark.fast
@pytest.mark.parametrize(
    "ref",
    [
        TensorRef(URI, "other", 100, 110, "U8"),
        TensorRef(URI, "e", 100, 110, "I8"),
        TensorRef("s3://b/other", "e", 100, 110, "U8"),
        TensorRef(URI, "e", 100, 120, "U8"),
        TensorRef(URI, "e", 0, 10, "U8"),
        TensorRef(URI, "e", 100, 100, "U8"),
        TensorRef(URI, "e", 110, 110 + BLOCK_BYTES + 5, "U8"),
    ],
)
def test_nothing_is_told_of_other_bytes(ref: TensorRef) -> None:
    assert known().of([ref]) == []
    assert KnownDigests([]).of([ref]) == []


class TestManifest:
    """What a ``mergemill.json`` beside an input tells, and when it is believed."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> str:
        return from_path(str(tmp_path))

    @staticmethod
    def ask(root: str, document: Any, *plans: Mapping[str, str]) -> dict[TensorRef, bytes]:
        store = LocalStore()
        info = store.put(join(root, "mergemill.json"), json.dumps(document).encode())
        weights = [ObjectInfo(URI, 1, "e", metadata) for metadata in plans]
        return blocks_of(store, info, weights, tensors())

    def test_of_the_plan_that_made_the_weights(self, root: str) -> None:
        document = {"plan_digest": "p", "blocks": written({name: digests(name) for name in SIZES})}
        found = self.ask(root, document, {PLAN_METADATA: "p"}, {PLAN_METADATA: "p", "more": "x"})
        assert found == {t.ref: bytes.fromhex("".join(digests(name))) for name, t in tensors().items()}
        for plans in ([], [{}], [{PLAN_METADATA: "q"}], [{PLAN_METADATA: "p"}, {}]):
            assert self.ask(root, document, *plans) == {}
        assert blocks_of(LocalStore(), None, [ObjectInfo(URI, 1, "e", {PLAN_METADATA: "p"})], tensors()) == {}

    @pytest.mark.parametrize(
        "blocks",
        [
            None,
            [],
            "x",
            {"a": 1},
            {"a": "!"},
            {"a": ""},
            {"a": "AAAA"},
            {"a": base64.b64encode(bytes(64)).decode()},
        ],
    )
    def test_anything_else_tells_nothing(self, root: str, blocks: Any) -> None:
        found = self.ask(root, {"plan_digest": "p", "blocks": blocks}, {PLAN_METADATA: "p"})
        assert not any(found.values())
        assert self.ask(root, [blocks], {PLAN_METADATA: "p"}) == {}

    def test_one_that_cannot_be_read_tells_nothing(self, root: str) -> None:
        store, weights = LocalStore(), [ObjectInfo(URI, 1, "e", {PLAN_METADATA: "p"})]
        text = store.put(join(root, "mergemill.json"), b"{")
        assert blocks_of(store, text, weights, tensors()) == {}
        store.delete(text.uri)
        assert blocks_of(store, text, weights, tensors()) == {}


def test_a_block_that_is_wrong_is_read_again_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data = LocalStore(), os.urandom(2 * BLOCK_BYTES + 7)
    info = store.put(from_path(str(tmp_path / "m")), b"head" + data)
    ref = TensorRef(info.uri, info.etag, 4, 4 + len(data), "U8")
    told = b"".join(
        hashlib.sha256(data[at : at + BLOCK_BYTES]).digest() for at in range(0, len(data), BLOCK_BYTES)
    )
    inputs = Inputs([ref], {(ref.uri, ref.start, ref.end): told})
    reads, wrong, read = [], [BLOCK_BYTES + 5], LocalStore.read_into

    def flip(self: LocalStore, uri: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        read(self, uri, start, buffer, etag)
        reads.append((start, buffer.nbytes))
        if wrong:
            at = wrong.pop() + ref.start - start
            buffer[at] ^= 1

    monkeypatch.setattr(LocalStore, "read_into", flip)
    view = memoryview(bytearray(inputs.nbytes))
    inputs.fetch(store, view)
    assert bytes(inputs.view(ref)) == data
    assert reads == [(4, len(data)), (4 + BLOCK_BYTES, BLOCK_BYTES)]
    wrong += [2 * BLOCK_BYTES + 6] * 2
    with pytest.raises(
        CorruptReadError, match=f"bytes {4 + 2 * BLOCK_BYTES} to {4 + len(data)} of {info.uri}"
    ):
        inputs.fetch(store, view)
