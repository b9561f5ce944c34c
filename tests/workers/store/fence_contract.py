"""What every object store must do about changes that come too late."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

import pytest

from workers.errors import ObjectNotFoundError
from workers.store import ObjectStore, Upload, join, read_bytes
from workers.store.fence import fenced


class GoneError(Exception):
    """There is no permission."""


def changes(store: ObjectStore, root: str) -> dict[str, Callable[[], object]]:
    """Every way to change something, with what it is about in place."""
    store.put(join(root, "object"), b"old")
    ready = store.open_upload(join(root, "ready"), 1, {})
    part = store.put_part(ready, 1, 0, b"x")
    return {
        "put": lambda: store.put(join(root, "object"), b"new"),
        "put_if_absent": lambda: store.put_if_absent(join(root, "absent"), b"new"),
        "delete": lambda: store.delete(join(root, "object")),
        "open_upload": lambda: store.open_upload(join(root, "opened"), 1, {}),
        "complete": lambda: store.complete(ready, [part]),
        "abort": lambda: store.abort(ready),
    }


def state(store: ObjectStore, root: str) -> tuple[dict[str, bytes], list[Upload]]:
    """What there is of it."""
    names = ("object", "absent", "opened", "ready")
    found = {}
    for name in names:
        try:
            found[name] = read_bytes(store, join(root, name))
        except ObjectNotFoundError:
            continue
    return found, [upload for name in names for upload in store.list_uploads(join(root, name))]


class FenceContract:
    """Part of the contract of stores."""

    def test_nothing_is_changed_without_permission(self, store: ObjectStore, root: str) -> None:
        made = changes(store, root)
        before = state(store, root)

        def refuse() -> float:
            raise GoneError

        for name, change in made.items():
            with fenced(refuse), pytest.raises(GoneError):
                change()
            assert state(store, root) == before, name
        with fenced(refuse):
            assert state(store, root) == before  # to look takes no permission

    def test_permission_that_has_ended_is_asked_for_again(self, store: ObjectStore, root: str) -> None:
        for name in changes(store, root):
            asked: list[float] = []

            def permit(asked: list[float] = asked) -> float:
                asked.append(time.time())
                return inf if len(asked) > 2 else asked[-1] - 1

            here = join(root, name)
            change = changes(store, here)[name]
            before = state(store, here)
            with fenced(permit):
                change()
            assert state(store, here) != before, name
            assert len(asked) == 3, name

    @pytest.mark.parametrize("name", ["a b.bin", "ünï-日本.bin", "a%20b+c&d=e.bin"])
    def test_strange_names_with_permission(self, store: ObjectStore, root: str, name: str) -> None:
        uri = join(root, "some dir", name)
        with fenced(lambda: time.time() + 60):
            assert store.put(uri, memoryview(b"data"), {"n": "1"}) == store.head(uri)
            assert read_bytes(store, uri) == b"data"
            upload = store.open_upload(uri, 3, {"n": "2"})
            store.complete(upload, [store.put_part(upload, 1, 0, b"new")])
            assert store.head(uri).metadata == {"n": "2"}
            store.delete(uri)
        assert list(store.list(root)) == []
