"""The S3 store against a real Ceph gateway, with both ways of sending checksums."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from botocore.awsrequest import AWSPreparedRequest
from botocore.exceptions import ClientError

from tests.workers.store.contract import StoreContract
from tests.workers.store.payloads import MIB, filled
from tests.workers.store.upload_contract import MIN_PART_BYTES
from workers.errors import AccessDeniedError, ObjectNotFoundError, StoreError, UploadNotFoundError
from workers.store import (
    Stores,
    StoreSettings,
    fence,
    from_path,
    join,
    read_bytes,
    read_range,
    s3_client,
    s3_expiry,
)
from workers.store.s3 import S3Store

pytestmark = pytest.mark.rgw


@pytest.fixture(scope="module", params=["when_required", "when_supported"])
def store(rgw_settings: StoreSettings, request: pytest.FixtureRequest) -> Iterator[S3Store]:
    store = S3Store(rgw_settings.model_copy(update={"s3_checksums": request.param, "s3_retry_wait_s": 0.001}))
    yield store
    store.close()


@contextlib.contextmanager
def sending(store: S3Store, body: bytes, times: int = 1000) -> Iterator[None]:
    """Send this in place of what was signed."""
    events, left = store._connection.client.meta.events, list(range(times))

    def replace(request: AWSPreparedRequest, **_: object) -> None:
        if left and request.method == "PUT":
            left.pop()
            request.body = body

    events.register("before-send.s3", replace)
    try:
        yield
    finally:
        events.unregister("before-send.s3", replace)


@pytest.fixture
def root(rgw_bucket: str) -> str:
    return rgw_bucket


class TestS3StoreOnRGW(StoreContract):
    pass


def test_the_server_verifies_content_md5_and_sha256_and_ignores_crc32(store: S3Store, root: str) -> None:
    """Why ``s3_checksums`` is what it is: if the last line fails, the server has learnt, and the setting may go."""
    bucket = root.removeprefix("s3://")
    upload = store.open_upload(join(root, "object"), 4, {})
    names = {"Bucket": bucket, "Key": "object", "UploadId": upload.id, "PartNumber": 1, "Body": b"data"}
    client = store._connection.client
    with pytest.raises(ClientError, match="BadDigest"):
        client.upload_part(**names, ContentMD5=base64.b64encode(hashlib.md5(b"else").digest()).decode())  # noqa: S324
    with sending(store, b"dbta"), pytest.raises(ClientError, match="XAmzContentSHA256Mismatch"):
        client.upload_part(**names)
    assert store.list_parts(upload) == []
    assert "ChecksumCRC32" not in client.upload_part(**names, ChecksumCRC32="AAAAAA==")


def test_flipped_bits_on_the_way_are_refused(store: S3Store, root: str) -> None:
    """The body that is sent differs from the one that the checksum was made of."""
    upload = store.open_upload(join(root, "object"), 4, {})
    with sending(store, b"dbta"), pytest.raises(StoreError, match="XAmzContentSHA256Mismatch"):
        store.put_part(upload, 1, 0, b"data")
    with sending(store, b"dbta"), pytest.raises(StoreError, match="XAmzContentSHA256Mismatch"):
        store.put(join(root, "small"), b"data")
    assert store.list_parts(upload) == []
    with pytest.raises(ObjectNotFoundError):
        store.head(join(root, "small"))
    store.put_part(upload, 1, 0, b"data")
    store.complete(upload, store.list_parts(upload))
    assert read_bytes(store, upload.uri) == b"data"


def test_flipped_bits_are_repaired_by_sending_again(store: S3Store, root: str) -> None:
    upload = store.open_upload(join(root, "object"), 4, {})
    with sending(store, b"dbta", times=1):
        part = store.put_part(upload, 1, 0, b"data")
    store.complete(upload, [part])
    assert read_bytes(store, upload.uri) == b"data"


def test_a_presigned_url_reads_without_credentials(store: S3Store, root: str) -> None:
    data = filled(100)
    store.put(join(root, "a b%.bin"), data)
    url = store.presign(join(root, "a b%.bin"), 60)
    request = urllib.request.Request(str(url), headers={"Range": "bytes=10-19"})  # noqa: S310 - loopback
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        assert answer.status == 206
        assert answer.read() == data[10:20]


def test_wrong_credentials(rgw_settings: StoreSettings, root: str) -> None:
    store = S3Store(rgw_settings.model_copy(update={"s3_access_key_id": "nobody"}))
    uri = join(root, "object")
    for action, attempt in {
        "look up": lambda: store.head(uri),
        "read": lambda: store.read_into(uri, 0, memoryview(bytearray(1))),
        "write": lambda: store.put(uri, b"x"),
        "list": lambda: list(store.list(root)),
        "open an upload": lambda: store.open_upload(uri, 1, {}),
        "delete": lambda: store.delete(uri),
    }.items():
        with pytest.raises(AccessDeniedError, match=rf"cannot {action}.*{root}.*credentials"):
            attempt()
    store.close()


def test_a_missing_bucket_is_named(store: S3Store) -> None:
    uri = "s3://no-such-bucket-anywhere/object"
    for attempt in (
        lambda: store.put(uri, b"x"),
        lambda: store.read_into(uri, 0, memoryview(bytearray(1))),
        lambda: list(store.list(uri)),
        lambda: store.open_upload(uri, 1, {}),
        lambda: store.delete(uri),
    ):
        with pytest.raises(ObjectNotFoundError, match=r"no-such-bucket-anywhere.*no such bucket"):
            attempt()


def test_parts_below_the_minimum(store: S3Store, root: str) -> None:
    upload = store.open_upload(join(root, "object"), 2, {})
    parts = [store.put_part(upload, number, number - 1, b"x") for number in (1, 2)]
    with pytest.raises(StoreError, match="EntityTooSmall"):
        store.complete(upload, parts)


def test_completing_an_aborted_upload_is_not_retried(
    rgw_settings: StoreSettings, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway answers 500, for ever; the store looks and knows better."""
    store = S3Store(rgw_settings)
    upload = store.open_upload(join(root, "object"), 1, {})
    parts = [store.put_part(upload, 1, 0, b"x")]
    store.abort(upload)
    client = store._connection.client
    calls: list[str] = []
    client.meta.events.register("before-send.s3", lambda request, **_: calls.append(request.method))
    with pytest.raises(UploadNotFoundError):
        store.complete(upload, parts)
    assert calls == ["POST", "GET"]
    store.close()


def test_more_than_a_page_of_objects_parts_and_uploads(
    store: S3Store, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.store.s3.PAGE", 3)
    upload = store.open_upload(join(root, "object"), 10, {})
    parts = [store.put_part(upload, number, number - 1, b"x") for number in range(1, 11)]
    assert store.list_parts(upload) == parts
    for number in range(10):
        store.put(join(root, "many", f"{number}"), b"")
    assert [info.uri[-1] for info in store.list(join(root, "many"))] == list("0123456789")
    uploads = {store.open_upload(join(root, "u"), 1, {}).id for _ in range(10)}
    assert {u.id for u in store.list_uploads(join(root, "u"))} == uploads


def test_copies_between_two_kinds_of_store(
    rgw_settings: StoreSettings, root: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stores = Stores(rgw_settings)
    files = from_path(str(tmp_path_factory.mktemp("files")))
    data = filled(MIN_PART_BYTES + MIB)
    here, there = stores.put(join(files, "a"), data), stores.put(join(root, "a"), data)
    for source, target in ((here, join(root, "b")), (there, join(files, "b"))):
        upload = stores.open_upload(target, len(data) - 2, {})
        part = stores.copy_part(upload, 1, 0, source.uri, 1, len(data) - 1, source.etag)
        stores.complete(upload, [part])
        assert read_range(stores, target, 0, len(data) - 2) == data[1:-1]
    stores.close()


class GoneError(Exception):
    """There is no permission any more."""


@pytest.mark.parametrize("ahead", [-45, 45])
def test_what_was_signed_in_time_and_comes_too_late_is_refused(
    rgw_settings: StoreSettings, root: str, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the process is stopped with the request in its hands, on a machine whose clock may be off."""
    for module in (fence, s3_client, s3_expiry):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=lambda: time.time() + ahead))
    store = S3Store(rgw_settings)
    store.put(join(root, "object"), b"old")
    changes: dict[str, Callable[[], object]] = {
        "put": lambda: store.put(join(root, "object"), b"new"),
        "put_if_absent": lambda: store.put_if_absent(join(root, "absent"), b"new"),
        "delete": lambda: store.delete(join(root, "object")),
        "open_upload": lambda: store.open_upload(join(root, "opened"), 1, {}),
    }

    def stop(request: AWSPreparedRequest, **_: object) -> None:
        if "X-Amz-Expires" in request.url:
            time.sleep(3.1)

    def late(change: Callable[[], object]) -> str:
        permits = [time.time() + ahead + 2]

        def permit() -> float:
            if not permits:
                raise GoneError
            return permits.pop()

        try:
            with fence.fenced(permit):
                change()
        except GoneError:
            return "refused"
        return "made"

    store._connection.client.meta.events.register("before-send.s3", stop)
    with ThreadPoolExecutor() as threads:
        answers = dict(zip(changes, threads.map(late, changes.values()), strict=True))
    store._connection.client.meta.events.unregister("before-send.s3", stop)
    assert answers == dict.fromkeys(changes, "refused")
    assert [info.uri for info in store.list(root)] == [join(root, "object")]
    assert read_bytes(store, join(root, "object")) == b"old"
    assert store.list_uploads(join(root, "opened")) == []
    with fence.fenced(lambda: time.time() + ahead + 3):
        for change in changes.values():
            change()
    assert [info.uri for info in store.list(root)] == [join(root, "absent")]
    assert len(store.list_uploads(join(root, "opened"))) == 1
    store.close()
