"""The directory store: the contract, and what only files can do wrong."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests.workers.store.contract import StoreContract
from tests.workers.store.payloads import MIB, filled
from workers.errors import (
    AccessDeniedError,
    InvalidPartError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreError,
    StoreUnavailableError,
)
from workers.store import StoreSettings, from_path, join, read_bytes
from workers.store import files as files_module
from workers.store.local import LocalStore


@pytest.fixture
def store() -> LocalStore:
    return LocalStore(StoreSettings(file_lock_timeout_s=5))


@pytest.fixture
def root(tmp_path: Path) -> str:
    (tmp_path / "röot dir").mkdir()
    return from_path(str(tmp_path / "röot dir"))


@pytest.fixture
def directory(tmp_path: Path, root: str) -> Path:
    return tmp_path / "röot dir"


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class TestLocalStore(StoreContract):
    min_part_bytes = 100_003


class TestLocalStoreWithinRoots(StoreContract):
    """The whole contract in the only directory that may be used."""

    min_part_bytes = 100_003

    @pytest.fixture
    def store(self, tmp_path: Path) -> LocalStore:
        return LocalStore(StoreSettings(file_roots=(str(tmp_path),)))


def test_a_place_is_not_writable_below_a_file_or_without_permission(
    store: LocalStore, root: str, directory: Path
) -> None:
    store.check_writable(join(root, "new", "object"))
    assert _names(directory) == []
    (directory / "file").touch()
    with pytest.raises(StoreError, match="file is a file, and there can be no directory"):
        store.check_writable(join(root, "file", "deep", "object"))
    directory.chmod(0o500)
    was = os.geteuid()
    os.seteuid(was or 65534)  # nothing is forbidden to root
    try:
        for name in ("object", "new/object"):
            with pytest.raises(
                AccessDeniedError, match=r"to the directory .*: Permission denied; check its permissions"
            ):
                store.check_writable(join(root, *name.split("/")))
    finally:
        os.seteuid(was)
        directory.chmod(0o700)


def test_a_place_where_nothing_can_be_made_is_named(store: LocalStore) -> None:
    """Not even root can, though its permissions say so."""
    with pytest.raises(StoreError, match="cannot write to the directory /proc: No such file or directory"):
        store.check_writable("file:///proc/out/.mergemill/claim.json")
    with pytest.raises(StoreError, match=r"cannot write file:///proc/out/x: .*: /proc/out"):
        store.put("file:///proc/out/x", b"")


def test_nothing_hidden_is_left_behind(store: LocalStore, root: str, directory: Path) -> None:
    store.put(join(root, "a"), b"x")
    store.put_if_absent(join(root, "b"), b"x")
    with pytest.raises(FileExistsError):
        store.put_if_absent(join(root, "b"), b"x", {"m": "1"})
    store.abort(store.open_upload(join(root, "c"), 1, {}))
    assert _names(directory) == ["a", "b"]


def test_objects_inside_the_hidden_directory_do_not_nest_another(
    store: LocalStore, root: str, directory: Path
) -> None:
    store.put_if_absent(join(root, ".mergemill", "claim.json"), b"{}", {"job": "1"})
    assert store.head(join(root, ".mergemill", "claim.json")).metadata == {"job": "1"}
    assert not (directory / ".mergemill" / ".mergemill").exists()


def test_deleting_all_that_is_listed_removes_the_hidden_directory(
    store: LocalStore, root: str, directory: Path
) -> None:
    store.put(join(root, ".mergemill", "progress", "1.json"), b"{}")
    upload = store.open_upload(join(root, "done"), 4, {"plan": "1"})
    store.complete(upload, [store.put_part(upload, 1, 0, b"data")])
    left = store.open_upload(join(root, "left"), 4, {"plan": "1"})
    store.put_part(left, 1, 0, b"data")
    hidden = [info.uri for info in store.list(root + "/.mergemill/")]
    assert len(hidden) >= 6
    for uri in hidden:
        store.delete(uri)
    assert _names(directory) == ["done"]
    assert store.list_uploads(left.uri) == []
    assert dict(store.head(upload.uri).metadata) == {}


def test_metadata_of_a_file_that_somebody_else_replaced_is_ignored(
    store: LocalStore, root: str, directory: Path
) -> None:
    etag = store.put(join(root, "a"), b"ours", {"plan": "1"}).etag
    (directory / "a").write_bytes(b"them")
    assert dict(store.head(join(root, "a")).metadata) == {}
    assert store.head(join(root, "a")).etag != etag


def test_a_change_during_a_read_is_noticed(
    store: LocalStore, root: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etag = store.put(join(root, "a"), filled(1000)).etag
    read_at = files_module.read_at

    def read_and_change(fd: int, offset: int, buffer: memoryview) -> int:
        got = read_at(fd, offset, buffer)
        (directory / "a").write_bytes(filled(1000, seed=1))
        return got

    monkeypatch.setattr(files_module, "read_at", read_and_change)
    with pytest.raises(ObjectChangedError):
        store.read_into(join(root, "a"), 0, memoryview(bytearray(10)), etag)


def test_the_space_of_an_upload_is_taken_when_it_opens(store: LocalStore, root: str, directory: Path) -> None:
    upload = store.open_upload(join(root, "a"), 8 * MIB, {})
    data = directory / ".mergemill" / "uploads" / upload.id / "data"
    assert data.stat().st_size == 8 * MIB
    assert data.stat().st_blocks * 512 >= 8 * MIB


def test_no_space_is_said_at_once_and_leaves_nothing(store: LocalStore, root: str, directory: Path) -> None:
    with pytest.raises(StoreError, match=r"open an upload for .*: No space left|too large"):
        store.open_upload(join(root, "a"), 1 << 56, {})
    assert _names(directory) == []


@pytest.mark.parametrize(
    ("number", "offset", "size"), [(0, 0, 1), (10_001, 0, 1), (1, -1, 1), (1, 5, 6), (1, 11, 0)]
)
def test_parts_that_do_not_fit(store: LocalStore, root: str, number: int, offset: int, size: int) -> None:
    upload = store.open_upload(join(root, "a"), 10, {})
    with pytest.raises(StoreError, match="part"):
        store.put_part(upload, number, offset, b"x" * size)
    assert store.list_parts(upload) == []


def test_parts_must_make_the_whole_object(store: LocalStore, root: str) -> None:
    upload = store.open_upload(join(root, "a"), 10, {})
    first, last = store.put_part(upload, 1, 0, b"x" * 4), store.put_part(upload, 3, 6, b"x" * 4)
    for parts, gap in (([first], "make 4 bytes"), ([first, last], "begins at 6"), ([last], "begins at 6")):
        with pytest.raises(InvalidPartError, match=gap):
            store.complete(upload, parts)
    overlap = store.put_part(upload, 2, 3, b"x" * 3)
    with pytest.raises(InvalidPartError, match="begins at 3"):
        store.complete(upload, [first, overlap, last])
    store.complete(upload, [first, store.put_part(upload, 2, 4, b"x" * 2), last])
    assert read_bytes(store, upload.uri) == b"x" * 10


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (errno.EACCES, AccessDeniedError, "permissions"),
        (errno.EROFS, AccessDeniedError, "Read-only"),
        (errno.ENOSPC, StoreError, "free some space"),
        (errno.EDQUOT, StoreError, "free some space"),
        (errno.EIO, StoreUnavailableError, "Input/output"),
        (errno.ENAMETOOLONG, StoreError, "too long"),
    ],
)
def test_errors_of_the_disk_say_what_to_do(
    store: LocalStore,
    root: str,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    kind: type[StoreError],
    says: str,
) -> None:
    upload = store.open_upload(join(root, "b"), 1, {})

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code), "/there")

    monkeypatch.setattr(os, "pwrite", fail)
    for write in (lambda: store.put(join(root, "a"), b"x"), lambda: store.put_part(upload, 1, 0, b"x")):
        with pytest.raises(kind, match=says):
            write()
    with pytest.raises(ObjectNotFoundError):
        store.head(join(root, "a"))
    assert store.list_parts(upload) == []


def test_copies_between_file_systems_go_through_memory(
    store: LocalStore, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = filled(3 * MIB + 5)
    etag = store.put(join(root, "source"), data).etag

    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "cross-device")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    upload = store.open_upload(join(root, "copy"), len(data) - 1, {})
    store.complete(upload, [store.copy_part(upload, 1, 0, join(root, "source"), 1, len(data), etag)])
    assert read_bytes(store, upload.uri) == data[1:]


def test_directories_and_symlinks(store: LocalStore, root: str, directory: Path, tmp_path: Path) -> None:
    (directory / "sub").mkdir()
    (tmp_path / "blob").write_bytes(b"blob")
    (directory / "link").symlink_to(tmp_path / "blob")  # as in a Hugging Face cache
    (directory / "dangling").symlink_to(tmp_path / "nothing")
    assert [info.uri for info in store.list(root)] == [join(root, "link")]
    assert read_bytes(store, join(root, "link")) == b"blob"
    with pytest.raises(StoreError, match="irectory"):
        store.put(join(root, "sub"), b"x")
    store.delete(join(root, "link"))
    store.delete(join(root, "dangling"))
    store.delete(join(root, "sub"))
    assert _names(directory) == ["sub"]
    assert (tmp_path / "blob").exists()


def test_a_file_is_not_a_directory(store: LocalStore, root: str) -> None:
    store.put(join(root, "a"), b"x")
    with pytest.raises(StoreError):
        store.put(join(root, "a", "b"), b"x")
    assert read_bytes(store, join(root, "a")) == b"x"


def test_files_have_no_urls(store: LocalStore, root: str) -> None:
    assert store.presign(join(root, "a"), 60) is None


def test_the_record_of_an_upload_names_no_path(store: LocalStore, root: str, directory: Path) -> None:
    """A directory that is moved takes its uploads along."""
    upload = store.open_upload(join(root, "a"), 4, {})
    store.put_part(upload, 1, 0, b"data")
    moved = directory.with_name("moved")
    directory.rename(moved)
    (found,) = store.list_uploads(from_path(str(moved / "a")))
    store.complete(found, store.list_parts(found))
    assert (moved / "a").read_bytes() == b"data"
    assert _names(moved) == ["a"]
