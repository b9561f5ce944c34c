"""What every object store must do; each store's test module inherits :class:`StoreContract`."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from workers.errors import (
    AlreadyExistsError,
    InvalidPartError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    TruncatedReadError,
    UploadNotFoundError,
)
from workers.store import ObjectStore, Upload, UploadedPart, join, read_bytes, read_range

MIB = 1 << 20
MIN_PART_BYTES = 5 * MIB
"""S3 takes no smaller part but the last."""

STRANGE_NAMES = ["a b.bin", "ünï-日本.bin", "100%.bin", "a%20b.bin", "plus+and&=;,.bin", "~tilde'(1)!*.bin"]


def filled(size: int, seed: int = 0) -> bytes:
    """``size`` bytes in which no two blocks are alike."""
    block = b"".join(((i * 2654435761 + seed * 97) & 0xFFFFFFFF).to_bytes(4, "big") for i in range(1 << 14))
    return b"".join((i + seed).to_bytes(8, "big") + block[8:] for i in range(-(-size // len(block))))[:size]


class StoreContract:
    """Inherit, and give the fixtures ``store`` and ``root`` (the URI of an empty directory or bucket)."""

    min_part_bytes = MIN_PART_BYTES
    """Smallest part that is not the last."""

    def _uploaded(
        self, store: ObjectStore, uri: str, pieces: list[bytes]
    ) -> tuple[Upload, list[UploadedPart]]:
        upload = store.open_upload(uri, sum(map(len, pieces)), {"plan": "abc"})
        parts, offset = [], 0
        for number, piece in enumerate(pieces, 1):
            parts.append(store.put_part(upload, number, offset, piece))
            offset += len(piece)
        return upload, parts

    # --- objects -------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [0, 1, 3 * MIB + 17])
    def test_what_was_put_is_read_back(self, store: ObjectStore, root: str, size: int) -> None:
        uri, data = join(root, "dir", "object"), filled(size)
        put = store.put(uri, data, {"Plan": "p1", "other": "x"})
        head = store.head(uri)
        assert (head.uri, head.size, head.etag) == (uri, size, put.etag)
        assert dict(head.metadata) == dict(put.metadata) == {"plan": "p1", "other": "x"}
        assert '"' not in head.etag
        assert head.etag
        assert read_bytes(store, uri) == data

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda b: memoryview(b"xx" + b)[2:]])
    def test_every_buffer_can_be_put(
        self, store: ObjectStore, root: str, kind: Callable[[bytes], object]
    ) -> None:
        data = filled(MIB + 5)
        store.put(join(root, "whole"), kind(data))  # type: ignore[arg-type]
        assert read_bytes(store, join(root, "whole")) == data
        upload = store.open_upload(join(root, "parts"), len(data), {})
        part = store.put_part(upload, 1, 0, kind(data))  # type: ignore[arg-type]
        store.complete(upload, [part])
        assert read_bytes(store, upload.uri) == data

    def test_overwriting_changes_the_etag_and_drops_old_metadata(self, store: ObjectStore, root: str) -> None:
        uri = join(root, "object")
        etags = [store.put(uri, b"%06d" % i, {"n": str(i)}).etag for i in range(20)]
        assert len(set(etags)) == 20
        store.put(uri, b"plain")
        assert dict(store.head(uri).metadata) == {}

    def test_missing_objects_are_not_found(self, store: ObjectStore, root: str) -> None:
        store.put(join(root, "dir", "object"), b"x")
        for uri in (join(root, "nothing"), join(root, "dir"), join(root, "dir", "object", "below")):
            with pytest.raises(ObjectNotFoundError, match="object"):
                store.head(uri)
            with pytest.raises(FileNotFoundError):
                store.read_into(uri, 0, memoryview(bytearray(1)))
            store.delete(uri)
        assert read_bytes(store, join(root, "dir", "object")) == b"x"

    def test_delete_removes_and_may_be_repeated(self, store: ObjectStore, root: str) -> None:
        uri = join(root, "object")
        store.put(uri, b"x", {"a": "b"})
        store.delete(uri)
        store.delete(uri)
        with pytest.raises(ObjectNotFoundError):
            store.head(uri)
        assert list(store.list(root)) == []

    @pytest.mark.parametrize("name", STRANGE_NAMES)
    def test_strange_names(self, store: ObjectStore, root: str, name: str) -> None:
        uri = join(root, "some dir", name)
        store.put(uri, b"data", {"n": "1"})
        assert read_bytes(store, uri) == b"data"
        assert store.head(uri).metadata["n"] == "1"
        assert uri in [info.uri for info in store.list(root)]
        upload = store.open_upload(join(root, "some dir", "copy of " + name), 3, {})
        assert store.list_uploads(upload.uri) == [upload]
        part = store.copy_part(upload, 1, 0, uri, 1, 4, store.head(uri).etag)
        store.complete(upload, [part])
        assert read_bytes(store, upload.uri) == b"ata"
        store.delete(uri)
        with pytest.raises(ObjectNotFoundError):
            store.head(uri)

    @pytest.mark.parametrize("bad", ["/../x", "/a/../../x"])
    def test_climbing_names_are_refused(self, store: ObjectStore, root: str, bad: str) -> None:
        with pytest.raises(StoreError, match=r"'\.\.'"):
            store.put(root + bad, b"x")
        with pytest.raises(StoreError, match=r"'\.\.'"):
            store.head(root + bad)

    # --- reads ---------------------------------------------------------------------------------

    def test_ranges(self, store: ObjectStore, root: str) -> None:
        uri, data = join(root, "object"), filled(3 * MIB)
        etag = store.put(uri, data).etag
        for start, end in [(0, 1), (0, len(data)), (len(data) - 1, len(data)), (12345, MIB + 777), (7, 7)]:
            assert read_range(store, uri, start, end, etag) == data[start:end]
            assert read_range(store, uri, start, end) == data[start:end]

    def test_a_read_fills_only_its_own_piece_of_a_bigger_buffer(self, store: ObjectStore, root: str) -> None:
        uri, data = join(root, "object"), filled(MIB)
        store.put(uri, data)
        buffer = bytearray(b"\xaa" * 300)
        store.read_into(uri, 50, memoryview(buffer)[100:200])
        assert buffer == b"\xaa" * 100 + data[50:150] + b"\xaa" * 100

    def test_long_ranges_are_whole(self, store: ObjectStore, root: str) -> None:
        uri, data = join(root, "object"), filled(41 * MIB + 3)
        etag = store.put(uri, data).etag
        assert read_range(store, uri, 1, len(data), etag) == data[1:]
        assert read_range(store, uri, 0, len(data)) == data
        with pytest.raises(ObjectChangedError):
            read_range(store, uri, 0, len(data), "0" * 32)
        with pytest.raises(TruncatedReadError):
            read_range(store, uri, 1, len(data) + 1, etag)

    @pytest.mark.parametrize("size", [0, 1, 100])
    def test_a_wrong_pin_is_refused(self, store: ObjectStore, root: str, size: int) -> None:
        uri = join(root, "object")
        old = store.put(uri, filled(100)).etag
        store.put(uri, filled(100, seed=1))
        with pytest.raises(ObjectChangedError, match="object"):
            store.read_into(uri, 0, memoryview(bytearray(size)), old)

    @pytest.mark.parametrize(("start", "end"), [(0, 101), (99, 101), (100, 101), (500, 600), (101, 101)])
    @pytest.mark.parametrize("pinned", [False, True])
    def test_reading_past_the_end(
        self, store: ObjectStore, root: str, start: int, end: int, pinned: bool
    ) -> None:
        uri = join(root, "object")
        etag = store.put(uri, filled(100)).etag
        with pytest.raises(TruncatedReadError, match="object"):
            read_range(store, uri, start, end, etag if pinned else None)

    def test_read_bytes_has_a_limit(self, store: ObjectStore, root: str) -> None:
        store.put(join(root, "object"), b"12345")
        assert read_bytes(store, join(root, "object"), limit=5) == b"12345"
        with pytest.raises(StoreError, match="5 bytes long"):
            read_bytes(store, join(root, "object"), limit=4)

    # --- put_if_absent -------------------------------------------------------------------------

    def test_put_if_absent(self, store: ObjectStore, root: str) -> None:
        uri = join(root, "claim")
        put = store.put_if_absent(uri, b"first", {"by": "1"})
        assert store.head(uri) == put
        with pytest.raises(AlreadyExistsError):
            store.put_if_absent(uri, b"second", {"by": "2"})
        with pytest.raises(FileExistsError):
            store.put_if_absent(uri, b"first", {"by": "1"})
        assert store.head(uri) == put
        assert read_bytes(store, uri) == b"first"
        store.delete(uri)
        store.put_if_absent(uri, b"third")
        assert read_bytes(store, uri) == b"third"

    def test_one_of_sixteen_wins(self, store: ObjectStore, root: str) -> None:
        uri = join(root, "claim")

        def claim(number: int) -> int | None:
            try:
                store.put_if_absent(uri, b"%d" % number, {"by": str(number)})
            except AlreadyExistsError:
                return None
            return number

        for _ in range(3):
            with ThreadPoolExecutor(16) as pool:
                winners = [number for number in pool.map(claim, range(16)) if number is not None]
            assert len(winners) == 1
            assert read_bytes(store, uri) == b"%d" % winners[0]
            assert store.head(uri).metadata["by"] == str(winners[0])
            store.delete(uri)

    # --- list ----------------------------------------------------------------------------------

    def test_list_takes_a_plain_prefix_and_sorts_by_name(self, store: ObjectStore, root: str) -> None:
        names = ["a/b", "a-b", "a.b", "ab/c/d", "b", "A", "a/c d", "é"]
        for name in names:
            store.put(join(root, name), name.encode())
        expected = {join(root, name): len(name.encode()) for name in sorted(names, key=str.encode)}
        assert [(i.uri, i.size) for i in store.list(root + "/")] == list(expected.items())

        def under(prefix: str) -> list[str]:
            return [info.uri for info in store.list(f"{root}/{prefix}")]

        assert under("a") == [join(root, name) for name in ("a-b", "a.b", "a/b", "a/c d", "ab/c/d")]
        assert under("a/") == [join(root, name) for name in ("a/b", "a/c d")]
        assert under("a/b") == [join(root, "a/b")]
        assert under("ab/c") == [join(root, "ab/c/d")]
        assert under("nothing") == under("nothing/at/all/") == []
        for info in store.list(root + "/"):
            assert store.head(info.uri).etag == info.etag

        def beside(prefix: str) -> list[str]:
            return [info.uri for info in store.list(f"{root}/{prefix}", beside=True)]

        assert beside("") == [join(root, name) for name in ("A", "a-b", "a.b", "b", "é")]
        assert beside("a") == [join(root, name) for name in ("a-b", "a.b")]
        assert beside("a/") == under("a/")
        assert beside("ab/") == []

    def test_an_open_upload_is_not_an_object(self, store: ObjectStore, root: str) -> None:
        upload, _ = self._uploaded(store, join(root, "object"), [b"x"])
        with pytest.raises(ObjectNotFoundError):
            store.head(upload.uri)
        assert upload.uri not in [info.uri for info in store.list(root)]

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

        with ThreadPoolExecutor(8) as pool:  # every part twice at once
            parts = list(pool.map(write, [1, 1, 2, 2, 3, 3, 4, 4]))
        assert parts[::2] == parts[1::2] == store.list_parts(upload)
        store.complete(upload, parts[::2])
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

    def test_whether_a_place_can_be_written_to_is_found_out_without_a_trace(
        self, store: ObjectStore, root: str
    ) -> None:
        store.put(join(root, "object"), b"x")
        for name in ("object", "new", "deep/down/new"):
            uri = join(root, *name.split("/"))
            store.check_writable(uri)
            assert store.list_uploads(uri) == []
        assert [info.uri for info in store.list(root + "/")] == [join(root, "object")]

    # --- processes -----------------------------------------------------------------------------

    def test_a_pickled_store_works(self, store: ObjectStore, root: str) -> None:
        store.put(join(root, "object"), b"x")  # the store has a client by now
        copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own
        try:
            assert read_bytes(copy, join(root, "object")) == b"x"
        finally:
            getattr(copy, "close", lambda: None)()

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
