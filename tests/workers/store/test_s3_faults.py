"""The S3 store when the server or the network fails: what is retried, how often, and what is said in the end."""

from __future__ import annotations

import hashlib
import pickle
import socket
from collections.abc import Callable, Iterator
from math import inf

import pytest

from tests.workers.store.faulty import Answer, FaultyServer, error, faulty_server, ranged
from tests.workers.store.payloads import filled
from workers.errors import (
    AccessDeniedError,
    AlreadyExistsError,
    InvalidPartError,
    ObjectChangedError,
    StoreError,
    StoreUnavailableError,
    TruncatedReadError,
    UploadNotFoundError,
)
from workers.store import StoreSettings, Upload, UploadedPart, read_range
from workers.store.fence import fenced
from workers.store.s3 import S3Store

URI = "s3://bucket/object"
UPLOAD = Upload(URI, "u1")
ATTEMPTS = 4
HEAD = Answer(200, b"", {"ETag": '"e1"', "x-amz-meta-plan": "p"}, length=5)
WRITTEN = Answer(200, b"", {"ETag": '"e1"'})


def settings_for(url: str, **changes: object) -> StoreSettings:
    return StoreSettings.model_validate(
        {
            "s3_endpoint_url": url,
            "s3_region": "us-east-1",
            "s3_access_key_id": "test",
            "s3_secret_access_key": "test",
            "s3_addressing_style": "path",
            "s3_max_attempts": ATTEMPTS,
            "s3_retry_wait_s": 0.001,
            "s3_read_timeout_s": 0.3,
        }
        | changes
    )


Serving = Callable[..., tuple[S3Store, FaultyServer]]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        yield server


@pytest.fixture(scope="module")
def stores(server: FaultyServer) -> Iterator[dict[str, S3Store]]:
    """One store per setting: making a boto3 client takes longer than most tests here."""
    made: dict[str, S3Store] = {}
    yield made
    for store in made.values():
        store.close()


@pytest.fixture
def serving(server: FaultyServer, stores: dict[str, S3Store]) -> Serving:
    def serve(*script: Answer, **changes: object) -> tuple[S3Store, FaultyServer]:
        server.restart(*script)
        settings = settings_for(server.url, **changes)
        return stores.setdefault(repr(changes), S3Store(settings)), server

    return serve


@pytest.mark.parametrize(
    "fault",
    [
        error(503, "SlowDown"),
        error(500, "InternalError"),
        error(502, "BadGateway"),
        error(429, "TooManyRequests"),
        error(400, "RequestTimeout"),
        Answer(0, reset=True),
        Answer(0),
        Answer(hang=True),
        ranged(b"01234", 0, 10, length=10),
        ranged(b"01234", 0, 10, length=10, reset=True),
        ranged(b"01234", 0, 10, length=10, hang=True),
    ],
    ids=repr,
)
def test_a_read_that_fails_twice_succeeds_at_the_third_attempt(serving: Serving, fault: Answer) -> None:
    store, server = serving(fault, fault, ranged(b"0123456789", 0, 10))
    assert read_range(store, URI, 0, 10, "e1") == b"0123456789"
    assert server.methods == ["GET"] * 3
    assert server.requests[2][2]["if-match"] == "e1"
    assert server.requests[2][2]["range"] == "bytes=0-9"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (error(503, "SlowDown"), StoreUnavailableError),
        (error(500, "InternalError"), StoreUnavailableError),
        (Answer(0, reset=True), StoreUnavailableError),
        (Answer(hang=True), StoreUnavailableError),
        (ranged(b"01234", 0, 10, length=10), StoreUnavailableError),
        (ranged(b"01234", 0, 10, length=10, reset=True), StoreUnavailableError),
        (ranged(b"01234", 0, 10, length=10, hang=True), StoreUnavailableError),
    ],
    ids=repr,
)
def test_attempts_are_bounded(serving: Serving, fault: Answer, kind: type[StoreError]) -> None:
    store, server = serving(fault)
    with pytest.raises(kind, match=URI):
        read_range(store, URI, 0, 10, "e1")
    assert server.methods == ["GET"] * ATTEMPTS


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (error(403, "AccessDenied"), AccessDeniedError, "policy"),
        (error(403, "SignatureDoesNotMatch"), AccessDeniedError, "credentials"),
        (error(400, "ExpiredToken"), AccessDeniedError, "credentials"),
        (error(403, "RequestTimeTooSkewed"), AccessDeniedError, "clock"),
        (error(403, "QuotaExceeded"), StoreError, "no room left"),
        (error(507, "XMinioStorageFull"), StoreError, "no room left"),
        (error(404, "NoSuchKey"), FileNotFoundError, "no such object"),
        (error(404, "NoSuchBucket"), FileNotFoundError, "no such bucket"),
        (error(412, "PreconditionFailed"), ObjectChangedError, "changed"),
        (error(416, "InvalidRange"), TruncatedReadError, "ends"),
        (error(400, "AuthorizationHeaderMalformed"), StoreError, "S3_REGION"),
        (error(501, "NotImplemented"), StoreError, "501"),
        (error(400, "Whatever"), StoreError, "Whatever"),
        (ranged(b"0123", 0, 4), TruncatedReadError, "ends at byte 4"),
        (Answer(200, b"0123456789", {"ETag": '"e1"'}), StoreError, "ignores ranges"),
    ],
    ids=repr,
)
def test_what_no_retry_can_mend_fails_at_once(
    serving: Serving, answer: Answer, kind: type[OSError], says: str
) -> None:
    store, server = serving(answer)
    with pytest.raises(kind, match=says) as caught:
        read_range(store, URI, 0, 10, "e1")
    assert isinstance(caught.value, StoreError)
    assert URI in str(caught.value)
    assert len(server.requests) == 1
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert (type(again), str(again)) == (type(caught.value), str(caught.value))


def test_one_failed_piece_fails_a_long_read(serving: Serving) -> None:
    store, server = serving(error(403, "AccessDenied"), s3_read_bytes=1 << 20)
    with pytest.raises(AccessDeniedError):
        read_range(store, URI, 0, 64 << 20, "e1")
    assert len(server.requests) < 64  # the rest was called off


def test_reads_use_a_connection_again_unless_it_broke(serving: Serving) -> None:
    whole, broken = ranged(b"0123456789", 0, 10), ranged(b"01234", 0, 10, length=10, hang=True)
    store, server = serving(whole, whole, whole, broken, whole, whole)
    store.close()
    for _ in range(5):
        assert read_range(store, URI, 0, 10, "e1") == b"0123456789"
    assert len(server.requests) == 6
    assert len(server.clients) == 2


def test_what_breaks_off_fills_no_more_than_its_own_buffer(serving: Serving) -> None:
    store, _ = serving(ranged(b"0123456789" * 100, 0, 1000, length=10), s3_max_attempts=1)
    buffer = bytearray(b"\xaa" * 30)
    store.read_into(URI, 0, memoryview(buffer)[10:20], "e1")  # more comes than was said
    assert buffer == b"\xaa" * 10 + b"0123456789" + b"\xaa" * 10


@pytest.mark.parametrize("size", [9, 128 << 10, (1 << 20) + 1])
@pytest.mark.parametrize("checksums", ["when_required", "when_supported"])
def test_parts_are_sent_again_with_the_sha256_in_their_signature_alone(
    serving: Serving, checksums: str, size: int
) -> None:
    data = filled(size)
    store, server = serving(
        error(503, "SlowDown"), Answer(0, reset=True), WRITTEN, WRITTEN, s3_checksums=checksums
    )
    part = store.put_part(UPLOAD, 1, 0, memoryview(b"xx" + data)[2:])
    assert part == UploadedPart(1, size, "e1")
    store.put(URI, data)
    assert server.methods == ["PUT"] * 4
    assert server.bodies == [data] * 4
    for _, _, headers in server.requests:
        assert headers["x-amz-content-sha256"] == hashlib.sha256(data).hexdigest()
        assert "x-amz-content-sha256" in headers["authorization"]
        assert headers.keys().isdisjoint({"content-md5", "x-amz-checksum-crc32"})
        assert headers["content-length"] == str(size)


def test_an_error_inside_a_200_is_retried(serving: Serving) -> None:
    failed = Answer(200, b'<?xml version="1.0"?><Error><Code>InternalError</Code></Error>')
    parts = Answer(200, b"<ListPartsResult><IsTruncated>false</IsTruncated></ListPartsResult>")
    done = Answer(200, b"<CompleteMultipartUploadResult><ETag></ETag></CompleteMultipartUploadResult>")
    store, server = serving(failed, parts, failed, parts, done)
    store.complete(UPLOAD, [UploadedPart(1, 1, "e")])
    assert server.methods == ["POST", "GET", "POST", "GET", "POST"]


def test_a_completion_whose_answer_was_lost(serving: Serving) -> None:
    store, server = serving(Answer(0, reset=True), error(404, "NoSuchUpload"))
    with pytest.raises(UploadNotFoundError):
        store.complete(UPLOAD, [UploadedPart(1, 1, "e")])
    assert server.methods == ["POST", "POST"]


def test_wrong_parts_are_not_retried(serving: Serving) -> None:
    store, server = serving(error(400, "InvalidPart"))
    with pytest.raises(InvalidPartError):
        store.complete(UPLOAD, [UploadedPart(1, 1, "e")])
    assert len(server.requests) == 1


@pytest.mark.parametrize("first", [Answer(0, reset=True), error(500, "InternalError")], ids=repr)
@pytest.mark.parametrize(
    ("data", "metadata", "wins"),
    [(b"claim", {"plan": "p"}, True), (b"other", {"plan": "p"}, False), (b"claim", {"plan": "q"}, False)],
)
def test_a_claim_whose_answer_was_lost_is_recognised(
    serving: Serving, first: Answer, data: bytes, metadata: dict[str, str], wins: bool
) -> None:
    script = (first, error(412, "PreconditionFailed"), HEAD, ranged(b"claim", 0, 5))
    store, server = serving(*script)
    if wins:
        assert store.put_if_absent(URI, data, metadata).etag == "e1"
    else:
        with pytest.raises(AlreadyExistsError):
            store.put_if_absent(URI, data, metadata)
    assert server.methods[:3] == ["PUT", "PUT", "HEAD"]
    assert {headers["if-none-match"] for method, _, headers in server.requests if method == "PUT"} == {"*"}


def test_a_lost_claim_is_not_looked_at_when_no_answer_was_lost(serving: Serving) -> None:
    store, server = serving(error(412, "PreconditionFailed"))
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent(URI, b"claim")
    assert server.methods == ["PUT"]


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        store = S3Store(settings_for(f"http://127.0.0.1:{free.getsockname()[1]}"))
        with pytest.raises(StoreUnavailableError, match="right and up"):
            store.head(URI)
        store.close()


def test_no_credentials(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    store, server = serving(HEAD, s3_access_key_id=None, s3_secret_access_key=None)
    with pytest.raises(AccessDeniedError, match=r"look up s3://bucket/object.*AWS_ACCESS_KEY_ID"):
        store.head(URI)
    assert server.requests == []


@pytest.mark.parametrize("changes", [{"s3_endpoint_url": "not a url"}, {"s3_secret_access_key": None}])
def test_settings_that_make_no_client(changes: dict[str, object]) -> None:
    with pytest.raises(StoreError, match="cannot"):
        S3Store(settings_for("http://127.0.0.1:1", **changes)).head(URI)


def test_the_secret_is_not_shown() -> None:
    settings = settings_for("http://127.0.0.1:1", s3_secret_access_key="hunter2")
    assert "hunter2" not in repr(settings) + str(settings) + settings.model_dump_json()


def test_a_source_that_changes_while_it_is_copied_is_noticed(serving: Serving) -> None:
    """Some servers ignore the pin of a copy, so the source is looked up before and after."""
    before, after = (
        Answer(200, b"", {"ETag": f'"{etag}"', "Content-Type": "binary/octet-stream"}, length=9)
        for etag in ("e1", "e2")
    )
    copied = Answer(200, b'<CopyPartResult><ETag>"p1"</ETag></CopyPartResult>')
    store, server = serving(before, copied, before)
    assert store.copy_part(UPLOAD, 1, 0, URI, 0, 9, "e1") == UploadedPart(1, 9, "p1")
    assert server.requests[1][2]["x-amz-copy-source-if-match"] == "e1"
    store, server = serving(before, copied, after)
    with pytest.raises(ObjectChangedError):
        store.copy_part(UPLOAD, 1, 0, URI, 0, 9, "e1")
    assert server.methods == ["HEAD", "PUT", "HEAD"]


def test_no_error_tells_a_signature(serving: Serving) -> None:
    """A request that expires is signed in its address, and addresses are told."""
    store, server = serving(Answer(0, reset=True))
    with fenced(lambda: inf), pytest.raises(StoreUnavailableError) as caught:
        store.delete(URI)
    assert "X-Amz-Signature=" in server.requests[0][1]
    assert "X-Amz-Signature=***" in str(caught.value)
    assert server.requests[0][1].rpartition("X-Amz-Signature=")[2] not in str(caught.value)
