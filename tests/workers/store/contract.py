"""What every object store must do, uploads included; each store's test module inherits :class:`StoreContract`."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.workers.store.fence_contract import FenceContract
from tests.workers.store.payloads import MIB, filled
from tests.workers.store.upload_contract import UploadContract
from workers.errors import (
    AlreadyExistsError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    TruncatedReadError,
)
from workers.store import ObjectStore, join, read_bytes, read_range

STRANGE_NAMES = ["a b.bin", "ünï-日本.bin", "100%.bin", "a%20b.bin", "plus+and&=;,.bin", "~tilde'(1)!*.bin"]


class StoreContract(UploadContract, FenceContract):
    """Inherit, and give the fixtures ``store`` and ``root`` (the URI of an empty directory or bucket)."""

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

    def test_open_uploads_are_found_by_where_they_are(self, store: ObjectStore, root: str) -> None:
        began, place = time.time(), join(root, "out")
        below = [store.open_upload(join(place, name), 3, {}) for name in ("a", "b", "b")]
        beside = [
            store.open_upload(join(root, *names), 3, {}) for names in (("out", "a", "deeper"), ("outx",))
        ]
        done = store.open_upload(join(place, "c"), 1, {})
        store.complete(done, [store.put_part(done, 1, 0, b"x")])
        found = store.uploads_below(place)
        assert sorted((u.uri, u.id) for u, _ in found) == sorted((u.uri, u.id) for u in below)
        if self.tells_when:
            assert all(began - 60 < opened_at < time.time() + 60 for _, opened_at in found)
        for upload, _ in found:
            store.abort(upload)
        assert store.uploads_below(place) == store.uploads_below(join(root, "nothing")) == []
        assert [upload for upload, _ in store.uploads_below(root)] == beside[1:]

    # --- permission ----------------------------------------------------------------------------

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
