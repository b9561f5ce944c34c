"""What every object store must do with uploads; a part of :class:`tests.workers.store.contract.StoreContract`."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.workers.store.payloads import MIB, filled
from workers.errors import (
    InvalidPartError,
    ObjectChangedError,
    ObjectNotFoundError,
    TruncatedReadError,
    UploadNotFoundError,
)
from workers.store import ObjectStore, Upload, UploadedPart, join, read_bytes, read_range

MIN_PART_BYTES = 5 * MIB
"""S3 takes no smaller part but the last."""


class UploadContract:
    """Takes the fixtures ``store`` and ``root`` of the whole contract."""

    min_part_bytes = MIN_PART_BYTES
    """Smallest part that is not the last."""
    tells_when = True
    """Whether it knows when an upload was opened."""
    writers_of_a_part = 2
    """How many may write the same part at once."""

    def _uploaded(
        self, store: ObjectStore, uri: str, pieces: list[bytes]
    ) -> tuple[Upload, list[UploadedPart]]:
        upload = store.open_upload(uri, sum(map(len, pieces)), {"plan": "abc"})
        parts, offset = [], 0
        for number, piece in enumerate(pieces, 1):
            parts.append(store.put_part(upload, number, offset, piece))
            offset += len(piece)
        return upload, parts

    # --- uploads -------------------------------------------------------------------------------

    def test_parts_out_of_order_make_the_object(self, store: ObjectStore, root: str) -> None:
        uri, size = join(root, "out", "shard"), self.min_part_bytes
        data = filled(2 * size + 1234)
        upload = store.open_upload(uri, len(data), {"Plan": "abc"})
        last = store.put_part(upload, 3, 2 * size, data[2 * size :])
        first = store.put_part(upload, 1, 0, data[:size])
        middle = store.put_part(upload, 2, size, memoryview(data)[size : 2 * size])
        assert [part.size for part in (first, middle, last)] == [size, size, 1234]
        assert store.list_parts(upload) == [first, middle, last]
        store.complete(upload, [last, first, middle])
        head = store.head(uri)
        assert (head.size, dict(head.metadata)) == (len(data), {"plan": "abc"})
        assert read_range(store, uri, 0, len(data), head.etag) == data
        assert store.list_uploads(uri) == []

    def test_completing_replaces_what_is_there(self, store: ObjectStore, root: str) -> None:
        uri = join(root, "object")
        old = store.put(uri, b"old", {"plan": "old"})
        upload, parts = self._uploaded(store, uri, [b"newer"])
        assert store.head(uri) == old
        store.complete(upload, parts)
        assert read_bytes(store, uri) == b"newer"
        assert dict(store.head(uri).metadata) == {"plan": "abc"}
        assert store.head(uri).etag != old.etag

    def test_an_empty_object_is_one_empty_part(self, store: ObjectStore, root: str) -> None:
        upload, parts = self._uploaded(store, join(root, "empty"), [b""])
        assert store.list_parts(upload) == parts
        store.complete(upload, parts)
        assert store.head(upload.uri).size == 0
        assert read_bytes(store, upload.uri) == b""

    def test_a_part_can_be_replaced(self, store: ObjectStore, root: str) -> None:
        upload = store.open_upload(join(root, "object"), 4, {})
        old = store.put_part(upload, 1, 0, b"good")
        new = store.put_part(upload, 1, 0, b"best")
        assert store.list_parts(upload) == [new]
        with pytest.raises(InvalidPartError):
            store.complete(upload, [old])
        store.complete(upload, [new])
        assert read_bytes(store, upload.uri) == b"best"

    def test_concurrent_parts(self, store: ObjectStore, root: str) -> None:
        size = self.min_part_bytes
        data = filled(4 * size)
        upload = store.open_upload(join(root, "object"), len(data), {})

        def write(number: int) -> UploadedPart:
            return store.put_part(
                upload, number, (number - 1) * size, data[(number - 1) * size : number * size]
            )

        times = self.writers_of_a_part
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(write, [number for number in range(1, 5) for _ in range(times)]))
        assert parts[::times] == parts[times - 1 :: times] == store.list_parts(upload)
        store.complete(upload, parts[::times])
        assert read_range(store, upload.uri, 0, len(data)) == data

    def test_one_of_several_versions_of_a_part_is_kept_whole(self, store: ObjectStore, root: str) -> None:
        upload = store.open_upload(join(root, "object"), MIB, {})
        versions = [bytes([i]) * MIB for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda data: store.put_part(upload, 1, 0, data), versions))
        kept = store.list_parts(upload)
        store.complete(upload, kept)
        assert read_bytes(store, upload.uri) in versions

    def test_uploads_are_listed_for_exactly_their_object(self, store: ObjectStore, root: str) -> None:
        uri = join(root, "shard")
        one, two = store.open_upload(uri, 1, {}), store.open_upload(uri, 1, {})
        other = store.open_upload(uri + "-2", 1, {})
        assert one.id != two.id
        assert {u.id for u in store.list_uploads(uri)} == {one.id, two.id}
        assert store.list_uploads(other.uri) == [other]
        assert store.list_uploads(join(root, "sha")) == []
        store.abort(one)
        assert store.list_uploads(uri) == [two]

    def test_an_aborted_upload_is_gone(self, store: ObjectStore, root: str) -> None:
        upload, parts = self._uploaded(store, join(root, "object"), [b"x"])
        store.abort(upload)
        store.abort(upload)
        self._is_gone(store, upload, parts)
        with pytest.raises(UploadNotFoundError):
            store.complete(upload, parts)
        assert list(store.list(root)) == []

    def test_a_completed_upload_is_gone(self, store: ObjectStore, root: str) -> None:
        upload, parts = self._uploaded(store, join(root, "object"), [b"data"])
        store.complete(upload, parts)
        etag = store.head(upload.uri).etag
        self._is_gone(store, upload, parts)
        store.abort(upload)
        assert store.head(upload.uri).etag == etag
        assert read_bytes(store, upload.uri) == b"data"

    def _is_gone(self, store: ObjectStore, upload: Upload, parts: list[UploadedPart]) -> None:
        assert store.list_uploads(upload.uri) == []
        with pytest.raises(UploadNotFoundError):
            store.list_parts(upload)
        with pytest.raises(UploadNotFoundError):
            store.put_part(upload, 1, 0, b"y" * parts[0].size)
        source = store.put(upload.uri + ".source", b"source")
        with pytest.raises(UploadNotFoundError):
            store.copy_part(upload, 1, 0, source.uri, 0, 1, source.etag)
        store.delete(source.uri)

    def test_an_ambiguous_complete_is_recognised(self, store: ObjectStore, root: str) -> None:
        """The answer was lost: completing again fails or succeeds, and HEAD tells whose object it is."""
        upload, parts = self._uploaded(store, join(root, "object"), [b"data"])
        store.complete(upload, parts)
        before = store.head(upload.uri)
        with contextlib.suppress(UploadNotFoundError):
            store.complete(upload, parts)
        assert store.head(upload.uri) == before
        assert (before.size, before.metadata["plan"]) == (4, "abc")

    def test_completing_with_wrong_parts(self, store: ObjectStore, root: str) -> None:
        upload, parts = self._uploaded(store, join(root, "object"), [b"data"])
        wrong = UploadedPart(1, 4, "0" * len(parts[0].etag))
        for named in ([], [wrong], [*parts, UploadedPart(2, 1, parts[0].etag)]):
            with pytest.raises(InvalidPartError):
                store.complete(upload, named)
        assert store.list_parts(upload) == parts
        store.complete(upload, parts)
        assert read_bytes(store, upload.uri) == b"data"

    def test_unknown_uploads(self, store: ObjectStore, root: str) -> None:
        for name in ("bogus", "..", "../../x", uuid.uuid4().hex):
            upload = Upload(join(root, "object"), name)
            store.abort(upload)
            with pytest.raises(UploadNotFoundError):
                store.list_parts(upload)
            with pytest.raises(UploadNotFoundError):
                store.complete(upload, [UploadedPart(1, 1, "x")])
            with pytest.raises(UploadNotFoundError):
                store.put_part(upload, 1, 0, b"x")

    def test_an_open_upload_is_not_an_object(self, store: ObjectStore, root: str) -> None:
        upload, _ = self._uploaded(store, join(root, "object"), [b"x"])
        with pytest.raises(ObjectNotFoundError):
            store.head(upload.uri)
        assert upload.uri not in [info.uri for info in store.list(root)]

    # --- copy ----------------------------------------------------------------------------------

    def test_parts_can_be_copied_within_the_store(self, store: ObjectStore, root: str) -> None:
        size, source = self.min_part_bytes, join(root, "in", "source")
        data = filled(size + 1000)
        etag = store.put(source, data).etag
        upload = store.open_upload(join(root, "out", "object"), size + 105, {})
        tail = store.copy_part(upload, 2, size, source, 50, 150, etag)
        head = store.copy_part(upload, 1, 0, source, 3, size + 3, etag)
        end = store.put_part(upload, 2, size, b"12345" + data[50:150])  # in place of the copy
        assert (head.size, tail.size) == (size, 100)
        assert store.list_parts(upload) == [head, end]
        store.complete(upload, [head, end])
        assert read_range(store, upload.uri, 0, size + 105) == data[3 : size + 3] + b"12345" + data[50:150]

    def test_copying_from_a_source_that_is_not_as_planned(self, store: ObjectStore, root: str) -> None:
        source = join(root, "source")
        old = store.put(source, b"old bytes").etag
        new = store.put(source, b"new bytes").etag
        upload = store.open_upload(join(root, "object"), 9, {})
        with pytest.raises(ObjectChangedError):
            store.copy_part(upload, 1, 0, source, 0, 9, old)
        with pytest.raises(TruncatedReadError):
            store.copy_part(upload, 1, 0, source, 5, 10, new)
        with pytest.raises(ObjectNotFoundError):
            store.copy_part(upload, 1, 0, join(root, "nothing"), 0, 9, new)
        assert store.list_parts(upload) == []

    # --- processes -----------------------------------------------------------------------------

    def test_an_upload_is_resumed_by_another_process(self, store: ObjectStore, root: str) -> None:
        data = filled(self.min_part_bytes + 10)
        upload = store.open_upload(join(root, "object"), len(data), {"plan": "abc"})
        mine = store.put_part(upload, 1, 0, data[: self.min_part_bytes])
        program = (
            "import pickle, sys\n"
            "store, upload, offset, data = pickle.load(sys.stdin.buffer)\n"
            "assert [u.id for u in store.list_uploads(upload.uri)] == [upload.id]\n"
            "held = store.list_parts(upload)\n"
            "new = store.put_part(upload, 2, offset, data)\n"
            "store.complete(upload, [*held, new])\n"
            "import json; print(json.dumps([p.etag for p in held]))\n"
        )
        message = pickle.dumps((store, upload, self.min_part_bytes, data[self.min_part_bytes :]))
        done = subprocess.run(
            [sys.executable, "-c", program], input=message, capture_output=True, check=False, env=os.environ
        )
        assert done.returncode == 0, done.stderr.decode()
        assert json.loads(done.stdout) == [mine.etag]
        assert read_range(store, upload.uri, 0, len(data)) == data
