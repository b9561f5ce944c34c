"""What processes that were killed half-way leave in a directory, and who clears it up."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.store import from_path, join
from workers.store.files import HIDDEN
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("left", ["a", "a/parts", "a-removed", "a-removed/parts"])
def test_directories_of_an_upload_that_was_never_opened_go_with_the_claim(tmp_path: Path, left: str) -> None:
    store, root = LocalStore(), from_path(str(tmp_path / "out"))
    claim = join(root, HIDDEN, "claim.json")
    store.put(claim, b"{}")
    (tmp_path / "out" / HIDDEN / "uploads" / left).mkdir(parents=True)
    store.delete(claim)
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_uploads_that_are_open_stay(tmp_path: Path) -> None:
    store, root = LocalStore(), from_path(str(tmp_path / "out"))
    claim, uri = join(root, HIDDEN, "claim.json"), join(root, "model.safetensors")
    store.put(claim, b"{}")
    upload = store.open_upload(uri, 3, {})
    (tmp_path / "out" / HIDDEN / "uploads" / "a" / "parts").mkdir(parents=True)
    store.delete(claim)
    part = store.put_part(upload, 1, 0, b"abc")
    store.complete(upload, [part])
    assert store.head(uri).size == 3
    assert not (tmp_path / "out" / HIDDEN).exists()
