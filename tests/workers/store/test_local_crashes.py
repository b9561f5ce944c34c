"""The directory store when processes die, stop or come late in the middle of a write."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import running
from workers.errors import ObjectNotFoundError, StoreUnavailableError, UploadNotFoundError
from workers.store import StoreSettings, files, from_path, join, read_bytes
from workers.store.local import LocalStore


@pytest.fixture
def store() -> LocalStore:
    return LocalStore(StoreSettings(file_lock_timeout_s=5))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "röot dir").mkdir()
    return tmp_path / "röot dir"


@pytest.fixture
def root(directory: Path) -> str:
    return from_path(str(directory))


@contextlib.contextmanager
def _child(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has printed its first line."""
    with running([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child
        child.kill()


_STOPS_AFTER_WRITING = """
import sys, threading
from workers.store import Upload
from workers.store import files
from workers.store import files
from workers.store.local import LocalStore
write_at = files.write_at
def write_half_and_stop(fd, offset, data):
    write_at(fd, offset, memoryview(data)[: len(data) // 2])
    print("ready", flush=True)
    threading.Event().wait()
files.write_at = write_half_and_stop
LocalStore().put_part(Upload(sys.argv[1], sys.argv[2]), 1, 0, b"Z" * 1000)
"""


def test_a_kill_while_a_part_is_written_leaves_no_false_record(store: LocalStore, root: str) -> None:
    upload = store.open_upload(join(root, "a"), 1000, {})
    store.put_part(upload, 1, 0, b"A" * 1000)
    with _child(_STOPS_AFTER_WRITING, upload.uri, upload.id) as child:
        assert (
            store.list_parts(upload) == []
        )  # half of it is overwritten: what was recorded is not true any more
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert store.list_parts(upload) == []
        part = store.put_part(upload, 1, 0, b"B" * 1000)  # the dead writer's lock is gone with it
    store.complete(upload, [part])
    assert read_bytes(store, upload.uri) == b"B" * 1000


def test_a_writer_that_is_stopped_blocks_its_part_and_the_end_but_not_other_parts(root: str) -> None:
    store = LocalStore(StoreSettings(file_lock_timeout_s=0.2))
    upload = store.open_upload(join(root, "a"), 2000, {})
    with _child(_STOPS_AFTER_WRITING, upload.uri, upload.id) as child:
        other = store.put_part(upload, 2, 1000, b"B" * 1000)
        with pytest.raises(StoreUnavailableError, match="is it stopped"):
            store.put_part(upload, 1, 0, b"A" * 1000)
        child.kill()
        child.wait()
        part = store.put_part(upload, 1, 0, b"A" * 1000)
    store.complete(upload, [part, other])
    assert read_bytes(store, upload.uri) == b"A" * 1000 + b"B" * 1000


def test_the_object_does_not_become_visible_under_a_writer(root: str) -> None:
    store = LocalStore(StoreSettings(file_lock_timeout_s=0.2))
    upload = store.open_upload(join(root, "a"), 1000, {})
    part = store.put_part(upload, 1, 0, b"A" * 1000)
    note = next(info.uri for info in store.list(root + "/.mergemill/") if info.uri.endswith("/1.json"))
    record = read_bytes(store, note)
    with _child(_STOPS_AFTER_WRITING, upload.uri, upload.id):
        store.put(note, record)  # as if the record were still there
        with pytest.raises(StoreUnavailableError):
            store.complete(upload, [part])
        with pytest.raises(ObjectNotFoundError):
            store.head(upload.uri)


def test_a_writer_that_comes_late_does_not_touch_the_finished_object(
    store: LocalStore, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = store.open_upload(join(root, "a"), 4, {})
    part = store.put_part(upload, 1, 0, b"good")
    flock = fcntl.flock
    completed = []

    def complete_first(fd: int, how: int) -> None:
        if how == fcntl.LOCK_SH | fcntl.LOCK_NB and not completed:
            completed.append(True)
            store.complete(upload, [part])  # between the writer's open and its lock
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", complete_first)
    with pytest.raises(UploadNotFoundError):
        store.put_part(upload, 1, 0, b"late")
    assert completed
    assert read_bytes(store, upload.uri) == b"good"


def test_a_crash_between_the_rename_and_the_cleaning_up(
    store: LocalStore, root: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = store.open_upload(join(root, "a"), 4, {"plan": "1"})
    part = store.put_part(upload, 1, 0, b"good")
    monkeypatch.setattr("workers.store.local_uploads._remove", lambda *_: None)
    store.complete(upload, [part])
    monkeypatch.undo()
    for gone in (lambda: store.complete(upload, [part]), lambda: store.list_parts(upload)):
        with pytest.raises(UploadNotFoundError):
            gone()
    assert store.list_uploads(upload.uri) == []
    assert store.head(upload.uri).metadata["plan"] == "1"
    store.abort(upload)
    assert not (directory / ".mergemill" / "uploads").exists()
    assert read_bytes(store, upload.uri) == b"good"


def test_what_is_recorded_was_synced_before(
    store: LocalStore, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = store.open_upload(join(root, "a"), 4, {})
    calls: list[str] = []

    def traced(name: str, call):  # type: ignore[no-untyped-def]
        def wrapper(*arguments):  # type: ignore[no-untyped-def]
            calls.append(name)
            return call(*arguments)

        return wrapper

    monkeypatch.setattr(os, "pwrite", traced("write", os.pwrite))
    monkeypatch.setattr(os, "fdatasync", traced("sync data", os.fdatasync))
    monkeypatch.setattr(os, "fsync", traced("sync", os.fsync))
    monkeypatch.setattr(Path, "replace", traced("rename", Path.replace))
    store.put_part(upload, 1, 0, b"data")
    assert calls == ["write", "sync data", "write", "sync", "rename", "sync"]


def test_what_was_half_opened_or_half_removed_is_found_and_can_be_aborted(
    store: LocalStore, root: str, directory: Path
) -> None:
    whole, half, doomed = (store.open_upload(join(root, name), 3, {}) for name in ("a", "b", "c"))
    uploads = directory / ".mergemill" / "uploads"
    (uploads / half.id / "upload.json").unlink()
    (uploads / doomed.id).rename(uploads / f"{doomed.id}-removed")
    assert store.list_uploads(half.uri) == store.list_uploads(doomed.uri) == []
    found = [upload for upload, _ in store.uploads_below(root)]
    assert sorted(upload.id for upload in found) == sorted([whole.id, half.id, doomed.id])
    assert whole in found
    for upload in found:
        store.abort(upload)
    assert not any(directory.iterdir())


def test_who_comes_late_does_not_touch_what_another_has_completed(
    store: LocalStore, root: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = store.open_upload(join(root, "object"), 4, {"plan": "one"})
    parts = [store.put_part(upload, 1, 0, b"data")]
    locked, late = files.locked, []

    @contextlib.contextmanager
    def completed_before(fd: int, how: int, timeout_s: float, uri: str) -> Iterator[None]:
        if not late:
            late.append(uri)
            store.complete(upload, parts)
            late.append(store.head(upload.uri))
        with locked(fd, how, timeout_s, uri):
            yield

    monkeypatch.setattr(files, "locked", completed_before)
    with pytest.raises(UploadNotFoundError):
        store.complete(upload, parts)
    assert store.head(upload.uri) == late[1]
    store.delete(upload.uri)
    assert not any(directory.iterdir())
