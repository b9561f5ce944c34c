"""Directories that others can write to as well: nothing leads out of what is allowed, and nothing is waited for."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from workers.errors import AccessDeniedError, ObjectNotFoundError, StoreError, UploadNotFoundError
from workers.store import Stores, StoreSettings, Upload, from_path, join, read_bytes
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    """The only directory that may be used."""
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory that may not, with a file in it."""
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (tmp_path / "outside" / "secret").write_bytes(b"secret")
    (tmp_path / "outside" / "deep" / "1.json").write_bytes(b"{}")
    return tmp_path / "outside"


@pytest.fixture
def store(inside: Path) -> LocalStore:
    return LocalStore(StoreSettings(file_roots=(str(inside),)))


def uri(path: Path) -> str:
    return from_path(str(path))


def contents(directory: Path) -> dict[str, bytes]:
    """All that is below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
    }


CALLS: dict[str, Callable[[LocalStore, str], object]] = {
    "head": lambda store, place: store.head(join(place, "secret")),
    "read": lambda store, place: read_bytes(store, join(place, "secret")),
    "put": lambda store, place: store.put(join(place, "new"), b"x", {"a": "b"}),
    "put over": lambda store, place: store.put(join(place, "secret"), b"x"),
    "put deep": lambda store, place: store.put(join(place, "a", "b", "new"), b"x"),
    "put if absent": lambda store, place: store.put_if_absent(join(place, "new"), b"x"),
    "claim": lambda store, place: store.put_if_absent(join(place, ".mergemill", "claim.json"), b"x"),
    "delete": lambda store, place: store.delete(join(place, "secret")),
    "check": lambda store, place: store.check_writable(join(place, "new")),
    "list": lambda store, place: list(store.list(place + "/")),
    "open upload": lambda store, place: store.open_upload(join(place, "new"), 10, {}),
    "list uploads": lambda store, place: store.list_uploads(join(place, "new")),
    "list parts": lambda store, place: store.list_parts(Upload(join(place, "new"), "0" * 32)),
    "opened": lambda store, place: store.opened(join(place, "secret")).__enter__(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("how", ["plainly", "by a link", "by a relative link", "by a link to the root"])
def test_nothing_outside_is_read_or_written(
    store: LocalStore, inside: Path, outside: Path, call: Callable[[LocalStore, str], object], how: str
) -> None:
    target = {
        "by a link": outside, "by a relative link": Path("../outside"), "by a link to the root": Path("/"),
    }  # fmt: skip
    place = outside
    if how in target:
        (inside / "link").symlink_to(target[how])
        place = inside / "link" if how != "by a link to the root" else Path(f"{inside}/link{outside}")
    before = contents(outside)
    with pytest.raises(AccessDeniedError, match="outside of the directories that this service may use"):
        call(store, uri(place))
    assert contents(outside) == before


def test_what_is_outside_by_name_is_not_even_looked_for(store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "inside-out").mkdir()
    for place in (tmp_path, tmp_path / "inside-out", tmp_path / "nowhere", Path("/proc/self/root")):
        with pytest.raises(AccessDeniedError, match="outside of the directories"):
            store.head(uri(place / "file"))


def test_a_link_to_a_file_outside_is_neither_read_nor_written_through(
    store: LocalStore, inside: Path, outside: Path
) -> None:
    (inside / "model").symlink_to(outside / "secret")
    for call in (
        store.head,
        lambda place: read_bytes(store, place),
        lambda place: store.opened(place).__enter__(),
    ):
        with pytest.raises(AccessDeniedError):
            call(uri(inside / "model"))
    assert list(store.list(uri(inside) + "/")) == []
    upload = store.open_upload(uri(inside / "copy"), 6, {})
    with pytest.raises(AccessDeniedError):
        store.copy_part(upload, 1, 0, uri(inside / "model"), 0, 6, "e")
    store.abort(upload)
    store.put(uri(inside / "model"), b"ours")  # in the link's place
    assert (outside / "secret").read_bytes() == b"secret"
    assert read_bytes(store, uri(inside / "model")) == b"ours"


def test_links_within_and_between_the_roots_are_followed(tmp_path: Path, inside: Path) -> None:
    """As in a Hugging Face cache, whose snapshots link to blobs."""
    other = tmp_path / "other"
    (inside / "blobs").mkdir()
    (inside / "blobs" / "1").write_bytes(b"one")
    (inside / "snapshot").mkdir()
    (inside / "snapshot" / "model").symlink_to("../blobs/1")
    other.mkdir()
    (other / "model").symlink_to(inside / "snapshot" / "model")
    (tmp_path / "alias").symlink_to(inside)
    roots = (from_path(str(other)), str(tmp_path / "alias"))  # a root may be a link itself
    store = LocalStore(StoreSettings(file_roots=roots))
    for path in (inside / "snapshot", other, tmp_path / "alias" / "snapshot"):
        assert [info.size for info in store.list(uri(path) + "/")] == [3]
        assert read_bytes(store, uri(path / "model")) == b"one"
    with pytest.raises(AccessDeniedError):
        LocalStore(StoreSettings(file_roots=(str(other),))).head(uri(other / "model"))


def test_a_directory_that_is_swapped_for_a_link_meanwhile_leads_nowhere_else(
    store: LocalStore, inside: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the write: the very race that checking a path first loses."""
    place = inside / "place"
    place.mkdir()
    replace = Path.replace

    def swap_first(source: Path, target: Path) -> Path:
        if not place.is_symlink():
            place.rename(inside / "moved")
            place.symlink_to(outside)
        return replace(source, target)

    before = contents(outside)
    monkeypatch.setattr(Path, "replace", swap_first)
    with pytest.raises(AccessDeniedError):  # when it comes back to clean up
        store.put(uri(place / "secret"), b"ours")
    assert contents(outside) == before
    assert (inside / "moved" / "secret").read_bytes() == b"ours"


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize(
    "planted", [".mergemill", ".mergemill/uploads", ".mergemill/tmp", ".mergemill/objects"]
)
def test_planted_links_where_the_service_keeps_its_own_are_not_followed(
    store: LocalStore, inside: Path, outside: Path, planted: str, limited: bool
) -> None:
    store = store if limited else LocalStore()
    (inside / planted).parent.mkdir(exist_ok=True)
    (inside / planted).symlink_to(outside)
    before = contents(outside)
    hidden = join(uri(inside), ".mergemill")
    for call in (
        lambda: store.put(join(hidden, "claim.json"), b"{}"),
        lambda: store.put(uri(inside / "new"), b"x", {"a": "b"}),
        lambda: store.open_upload(uri(inside / "new"), 10, {}),
        lambda: store.list_uploads(uri(inside / "new")),
        lambda: [store.delete(info.uri) for info in store.list(hidden + "/")],
    ):
        try:
            call()
        except StoreError as error:
            assert "link" in str(error) or "Not a directory" in str(error)
    assert contents(outside) == before


@pytest.mark.parametrize("limited", [True, False])
def test_cleaning_up_does_not_delete_what_links_lead_to(
    store: LocalStore, inside: Path, outside: Path, limited: bool
) -> None:
    store = store if limited else LocalStore()
    (inside / ".mergemill").mkdir()
    for name, target in {"a": outside, "b": outside / "deep", "c": outside / "secret", "d": Path()}.items():
        (inside / ".mergemill" / name).symlink_to(target)
    before = contents(outside)
    for info in list(store.list(join(uri(inside), ".mergemill") + "/")):
        store.delete(info.uri)
    assert contents(outside) == before


def test_a_loop_of_links_is_listed_in_no_time(inside: Path) -> None:
    (inside / "d").mkdir()
    for name in ("a", "b", "c"):
        (inside / "d" / name).symlink_to(".")
        (inside / name).symlink_to(".")
    assert list(LocalStore().list(uri(inside) + "/")) == []


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.open(path.parent, os.O_PATH)  # a socket's path may not be long
        try:
            made.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [_fifo, _socket, _device, Path.mkdir])
def test_what_is_no_file_is_no_object_and_nobody_waits_for_it(
    inside: Path, make: Callable[[Path], None]
) -> None:
    store = LocalStore()
    make(inside / "model.safetensors")
    for call in (
        store.head,
        lambda place: read_bytes(store, place),
        lambda place: store.opened(place).__enter__(),
    ):
        with pytest.raises(ObjectNotFoundError, match="a directory or a device, not an object"):
            call(uri(inside / "model.safetensors"))
    assert list(store.list(uri(inside) + "/")) == []
    upload = store.open_upload(uri(inside / "copy"), 6, {})
    with pytest.raises(ObjectNotFoundError):
        store.copy_part(upload, 1, 0, uri(inside / "model.safetensors"), 0, 6, "e")


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"name": 1}', '{"name": "a", "size": "x", "metadata": 3}', "[" * 100_000, "\udcff",
     '{"name": "a", "size": 4, "metadata": {}, "more": 1' + "0" * 5000 + "}", '{"name": "a"' + " " * (1 << 20) + "}"],
)  # fmt: skip
def test_notes_that_somebody_else_wrote_are_none(inside: Path, text: str) -> None:
    store, place = LocalStore(), uri(inside / "a")
    etag = store.put(place, b"data", {"k": "v"}).etag
    upload = store.open_upload(place, 4, {})
    part = store.put_part(upload, 1, 0, b"more")
    hidden = inside / ".mergemill"
    data = text.encode(errors="surrogateescape")
    (hidden / "objects" / f"{etag}.json").write_bytes(data)
    assert store.head(place).metadata == {}
    (hidden / "uploads" / upload.id / "parts" / "1.json").write_bytes(data)
    (hidden / "uploads" / upload.id / "parts" / "x.json").write_bytes(data)
    assert store.list_parts(upload) == []
    store.put_part(upload, 1, 0, b"more")
    assert store.list_parts(upload) == [part]
    (hidden / "uploads" / upload.id / "upload.json").write_bytes(data)
    assert store.list_uploads(place) == []


@pytest.mark.timeout(20)
def test_notes_that_are_pipes_are_not_waited_for(inside: Path) -> None:
    store, place = LocalStore(), uri(inside / "a")
    etag = store.put(place, b"data", {"k": "v"}).etag
    note = inside / ".mergemill" / "objects" / f"{etag}.json"
    note.unlink()
    os.mkfifo(note)
    assert store.head(place).metadata == {}


def test_no_directories_at_all(inside: Path) -> None:
    store = Stores(StoreSettings(file_roots=()))
    with pytest.raises(AccessDeniedError, match=r"there are none.*MERGEMILL_STORE__FILE_ROOTS"):
        store.head(uri(inside / "a"))


def test_roots_are_absolute_and_the_root_is_everything(inside: Path) -> None:
    (inside / "a").write_bytes(b"a")
    everything = StoreSettings(file_roots=("/", str(inside)))
    assert LocalStore(everything).head(uri(inside / "a")).size == 1
    assert StoreSettings(file_roots=("/a//b/./", "file:///c%20d")).file_roots == ("/a/b", "/c d")
    assert StoreSettings.model_validate_json(everything.model_dump_json()) == everything
    for wrong in ("relative", "", "../up", "/a/../b", "s3://bucket/a", "file://host/a"):
        with pytest.raises(ValidationError):
            StoreSettings(file_roots=(wrong,))


def test_the_ids_of_uploads_cannot_climb(store: LocalStore, inside: Path, outside: Path) -> None:
    (outside / "upload.json").write_text(json.dumps({"name": "a", "size": 1, "metadata": {}}))
    (outside / "data").write_bytes(b"x")
    before = contents(outside)
    upload = Upload(uri(inside / "a"), "../../../outside")
    store.abort(upload)
    with pytest.raises(UploadNotFoundError):
        store.list_parts(upload)
    assert contents(outside) == before
