"""The router: each URI goes to the store of its scheme."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.workers.store.contract import StoreContract
from workers.errors import StoreError
from workers.store import ObjectStore, Stores, StoreSettings, Upload, from_path, open_stores


@pytest.fixture
def store() -> Stores:
    return open_stores(StoreSettings())


@pytest.fixture
def root(tmp_path: Path) -> str:
    return from_path(str(tmp_path))


class TestStores(StoreContract):
    min_part_bytes = 1000


_UPLOAD = Upload("gs://bucket/object", "u")
_FILE_UPLOAD = Upload("file:///object", "u")
_CALLS: dict[str, Callable[[ObjectStore], object]] = {
    "head": lambda store: store.head("gs://bucket/object"),
    "read_into": lambda store: store.read_into("gs://bucket/object", 0, memoryview(bytearray(1))),
    "put": lambda store: store.put("gs://bucket/object", b""),
    "put_if_absent": lambda store: store.put_if_absent("gs://bucket/object", b""),
    "delete": lambda store: store.delete("gs://bucket/object"),
    "list": lambda store: list(store.list("gs://bucket/")),
    "presign": lambda store: store.presign("gs://bucket/object", 1),
    "open_upload": lambda store: store.open_upload("gs://bucket/object", 1, {}),
    "put_part": lambda store: store.put_part(_UPLOAD, 1, 0, b""),
    "copy_part": lambda store: store.copy_part(_UPLOAD, 1, 0, "file:///a", 0, 1, "e"),
    "copy_part from": lambda store: store.copy_part(_FILE_UPLOAD, 1, 0, "gs://bucket/a", 0, 1, "e"),
    "list_parts": lambda store: store.list_parts(_UPLOAD),
    "list_uploads": lambda store: store.list_uploads("gs://bucket/object"),
    "complete": lambda store: store.complete(_UPLOAD, []),
    "abort": lambda store: store.abort(_UPLOAD),
}


@pytest.mark.fast
@pytest.mark.parametrize("call", _CALLS.values(), ids=_CALLS)
def test_unknown_schemes_are_refused_with_those_that_are_known(call: Callable[[ObjectStore], object]) -> None:
    with pytest.raises(StoreError, match=r"gs://bucket.*supported are s3://bucket/key and file:///path"):
        call(open_stores())


@pytest.mark.fast
def test_settings_are_frozen_strict_and_pickle() -> None:
    settings = StoreSettings.model_validate({"s3_secret_access_key": "hunter2"})
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301 - our own
    with pytest.raises(ValidationError):
        StoreSettings.model_validate({"s3_endpoint": "x"})
    with pytest.raises(ValidationError):
        settings.s3_region = "x"  # type: ignore[misc]
