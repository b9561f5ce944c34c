"""Where a key's merges may read and write, with links that lead elsewhere and names that are not what they seem."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.access import ConfinedStore, confine, grant, is_within, size_problems
from service.keys import HUB, Access, ApiKey, Limits, Scope, new_key
from service.planning.price import Price
from workers.errors import ForbiddenError, ObjectChangedError
from workers.store import Stores, open_stores
from workers.store.base import ObjectInfo, ObjectStore, Upload

pytestmark = pytest.mark.fast


def key(inputs: list[str], outputs: list[str] | None = None) -> ApiKey:
    return new_key("a", [Scope.SUBMIT], 0.0, inputs=inputs, outputs=outputs or [])[0]


class Untouchable:
    """A store, and a file system, that nobody may ask anything."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was asked for")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A team's directory and a secret one beside it."""
    for name in ("team/model", "team/out", "team2", "secret"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("team/model/config.json", "secret/config.json", "team2/config.json"):
        (tmp_path / name).write_text(name)
    return tmp_path


def test_every_place_that_is_refused_is_named_and_none_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "realpath", Untouchable().__getattr__)
    names = [
        "s3://b/team/a",
        "s3://b/team2/a",
        "s3://b/team2/a",
        "/etc",
        "org/name",
        "nonsense/../x",
        "s3://x/../y",
    ]
    with pytest.raises(ForbiddenError) as caught:
        grant(
            key(["s3://b/team"], ["s3://b/out"]), names, "s3://b/team/out", {"org/": "s3://c/org"}, Limits()
        )
    named = [problem.partition(": ")[0] for problem in caught.value.problems]
    assert named == ["s3://b/team2/a", "/etc", "org/name", "s3://b/team/out"]
    assert "s3://c" not in str(caught.value)  # where the operator keeps it is none of the caller's business


def test_what_is_granted() -> None:
    made = key(["s3://b/team", HUB], ["s3://b/out"])
    access = grant(
        made, ["s3://b/team/a", "org/name@v2"], "s3://b/out/1", {"org/": "/hub"}, Limits(input_bytes=7)
    )
    assert access == Access(
        inputs=("s3://b/team",), outputs=("s3://b/out",), mapped=("file:///hub/name%40v2",), input_bytes=7
    )
    assert grant(key(["file:///hub"]), ["org/name"], None, {"org/": "/hub"}, Limits()).mapped == ()
    with pytest.raises(ForbiddenError):
        grant(key([HUB]), ["/hub/name"], None, {"org/": "/hub"}, Limits())  # a place, not a hub name
    assert grant(key(["*"], ["*"]), ["/x"], "s3://b/o", {}, Limits()).inputs == ("*",)


def test_upper_case_schemes_are_no_hub_names() -> None:
    """Whatever `resolve_model` makes of them, `hub:` does not let them in."""
    for name in ("S3://b/k", "FILE:///etc", "File:///etc"):
        access = None
        try:
            access = grant(key([HUB]), [name], None, {"": "s3://hub"}, Limits())
        except ForbiddenError:
            continue
        assert access.mapped == ()


def test_links_do_not_lead_out(place: Path) -> None:
    team = (place / "team").as_uri()
    (place / "team" / "link").symlink_to(place / "secret")
    (place / "team" / "inside").symlink_to(place / "team" / "model")
    (place / "team" / "loop").symlink_to(place / "team" / "loop")
    (place / "alias").symlink_to(place / "team")
    (place / "secret" / "back").symlink_to(place / "team")
    assert is_within(f"{team}/model", [team])
    assert is_within(f"{team}/inside/config.json", [team])
    assert is_within(f"{team}/not/there/yet", [team])
    assert not is_within(f"{team}/link", [team])
    assert not is_within(f"{team}/link/config.json", [team])
    assert is_within(f"{team}/loop", [team])  # it stays where it is, and opens nothing
    # a prefix may be a link itself, and then both its names are good
    alias = (place / "alias").as_uri()
    assert is_within(f"{alias}/model", [alias])
    assert is_within(f"{team}/model", [alias])
    assert not is_within(f"{alias}/link", [alias])
    # a way in by a place that is not allowed is not allowed
    assert not is_within(f"{place.as_uri()}/secret/back/model", [team])
    # the place that a link leads to may be allowed by another prefix
    assert is_within(f"{team}/link", [team, (place / "secret").as_uri()])
    assert is_within(f"{team}/link", ["*"])


@pytest.fixture
def confined(place: Path) -> ObjectStore:
    team = (place / "team").as_uri()
    access = Access(inputs=(f"{team}/model",), outputs=(f"{team}/out",))
    return confine(open_stores(), access, f"{team}/out/1")


def test_without_access_there_is_nothing_to_confine() -> None:
    store = open_stores()
    assert confine(store, None) is store


def test_reading(place: Path, confined: ObjectStore) -> None:
    model, out = (place / "team/model").as_uri(), (place / "team/out").as_uri()
    info = confined.head(f"{model}/config.json")
    buffer = bytearray(info.size)
    confined.read_into(info.uri, 0, memoryview(buffer), info.etag)
    assert buffer == b"team/model/config.json"
    confined.read_into(info.uri, 0, memoryview(buffer))
    assert [found.uri for found in confined.list(f"{model}/")] == [info.uri]
    confined.put(f"{out}/1/a", b"abc")
    assert confined.head(f"{out}/1/a").size == 3  # its own output it may read
    (place / "team/out/2").mkdir()
    (place / "team/out/2/a").write_text("somebody else's")
    for uri in (
        f"{out}/2/a",
        f"{out}/11/a",
        (place / "secret/config.json").as_uri(),
        f"{model}/../../secret/config.json",
    ):
        for act in (
            lambda uri=uri: confined.head(uri),
            lambda uri=uri: confined.read_into(uri, 0, memoryview(bytearray(1))),
            lambda uri=uri: confined.list(f"{uri}/"),
            lambda uri=uri: confined.presign(uri, 1),
        ):
            with pytest.raises(ForbiddenError):
                act()


def test_a_linked_shard_is_seen_in_a_listing_and_by_name(place: Path, confined: ObjectStore) -> None:
    model = (place / "team/model").as_uri()
    for name in ("model.safetensors", "tokenizer.json"):
        (place / "team/model" / name).symlink_to(place / "secret/config.json")
    with pytest.raises(ForbiddenError) as caught:
        confined.list(f"{model}/", beside=True)
    assert len(caught.value.problems) == 2  # all of them at once
    with pytest.raises(ForbiddenError):
        confined.head(f"{model}/model.safetensors")
    with pytest.raises(ForbiddenError):
        confined.read_into(f"{model}/model.safetensors", 0, memoryview(bytearray(1)), "any")


def test_what_the_operator_maps_may_be_links(place: Path) -> None:
    """As in the cache of a hub, whose snapshots are links to blobs beside them."""
    (place / "hub").mkdir()
    (place / "hub/config.json").symlink_to(place / "secret/config.json")
    store = confine(open_stores(), Access(inputs=(), outputs=(), mapped=((place / "hub").as_uri(),)))
    assert store.head((place / "hub/config.json").as_uri()).size == len("secret/config.json")
    with pytest.raises(ForbiddenError):
        store.head((place / "hub2").as_uri())


class Swapping:
    """A store during whose ``head`` somebody swaps a directory for a link, and then back again."""

    def __init__(self, store: Stores, place: Path, back: bool) -> None:
        self._store = store
        self._model, self._away, self._secret = place / "team/model", place / "team/away", place / "secret"
        self._back = back

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def head(self, uri: str) -> ObjectInfo:
        self._model.rename(self._away)
        self._model.symlink_to(self._secret)
        info = self._store.head(uri)
        if self._back:
            self._model.unlink()
            self._away.rename(self._model)
        return info


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="the kernel does not tell where a file is")
def test_links_that_are_swapped_while_it_looks(place: Path, back: bool) -> None:
    access = Access(inputs=((place / "team").as_uri(),), outputs=())
    swapped = ConfinedStore(Swapping(open_stores(), place, back), access)  # type: ignore[arg-type]
    uri = (place / "team/model/config.json").as_uri()
    with pytest.raises(ForbiddenError):
        swapped.head(uri)
    if back:
        with pytest.raises(ForbiddenError):  # whoever names no ETag is given none of what was not looked at
            swapped.read_into(uri, 0, memoryview(bytearray(1)))


def test_a_file_that_was_looked_at_is_the_one_that_is_read(place: Path, confined: ObjectStore) -> None:
    uri = (place / "team/model/config.json").as_uri()
    info = confined.head(uri)
    (place / "team/model").rename(place / "team/away")
    (place / "team/model").symlink_to(place / "secret")
    with pytest.raises(ObjectChangedError):  # as a worker reads it, who knows no keys
        open_stores().read_into(uri, 0, memoryview(bytearray(5)), info.etag)


OUTSIDE = "s3://elsewhere/x"
WRITES: dict[str, Callable[[ObjectStore], object]] = {
    "put": lambda store: store.put(OUTSIDE, b""),
    "put_if_absent": lambda store: store.put_if_absent(OUTSIDE, b""),
    "delete": lambda store: store.delete(OUTSIDE),
    "check_writable": lambda store: store.check_writable(OUTSIDE),
    "open_upload": lambda store: store.open_upload(OUTSIDE, 1, {}),
    "put_part": lambda store: store.put_part(Upload(OUTSIDE, "u"), 1, 0, b""),
    "copy_part": lambda store: store.copy_part(Upload("s3://b/o/1/x", "u"), 1, 0, OUTSIDE, 0, 1, "e"),
    "list_parts": lambda store: store.list_parts(Upload(OUTSIDE, "u")),
    "uploads_below": lambda store: store.uploads_below(OUTSIDE),
    "list_uploads": lambda store: store.list_uploads(OUTSIDE),
    "complete": lambda store: store.complete(Upload(OUTSIDE, "u"), []),
    "abort": lambda store: store.abort(Upload(OUTSIDE, "u")),
    "head": lambda store: store.head(OUTSIDE),
    "read_into": lambda store: store.read_into(OUTSIDE, 0, memoryview(bytearray(1)), "e"),
    "list": lambda store: store.list(f"{OUTSIDE}/"),
    "presign": lambda store: store.presign(OUTSIDE, 1),
}


@pytest.mark.parametrize("act", WRITES)
def test_nothing_is_asked_of_a_place_outside(act: str) -> None:
    access = Access(inputs=("s3://b/i",), outputs=("s3://b/o",))
    store = ConfinedStore(Untouchable(), access, "s3://b/o/1")  # type: ignore[arg-type]
    with pytest.raises(ForbiddenError):
        WRITES[act](store)


def test_all_that_a_store_does_is_confined() -> None:
    assert WRITES.keys() == {name for name, _ in inspect.getmembers(ObjectStore, inspect.isfunction)} - {
        name for name in dir(ObjectStore) if name.startswith("_")
    }


def test_nothing_is_written_to_an_input(place: Path, confined: ObjectStore) -> None:
    for uri in ("team/model/x", "team/out/2/x", "secret/x"):
        with pytest.raises(ForbiddenError):
            confined.put((place / uri).as_uri(), b"")
    (place / "team/out/1").symlink_to(place / "secret")
    with pytest.raises(ForbiddenError):
        confined.put((place / "team/out/1/x").as_uri(), b"")
    assert not (place / "secret/x").exists()


def test_bytes_of_one_job() -> None:
    price = Price(**dict.fromkeys(Price.__dataclass_fields__, 0) | {"input_bytes": 11})
    access = Access(inputs=(), outputs=(), input_bytes=10)
    (problem,) = size_problems(access, price)
    assert "11 bytes" in problem
    assert "allows 10" in problem
    assert size_problems(access.model_copy(update={"input_bytes": 11}), price) == []
    assert size_problems(access.model_copy(update={"input_bytes": 0}), price) == []
    assert size_problems(None, price) == size_problems(access, None) == []
