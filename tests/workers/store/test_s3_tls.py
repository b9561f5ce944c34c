"""The S3 store over TLS: whom it trusts, and which one checksum guards what it sends."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.workers.store.faulty import Answer, FaultyServer, faulty_server, ranged
from tests.workers.store.payloads import filled
from tests.workers.store.test_s3_faults import UPLOAD, URI, WRITTEN, settings_for
from workers.errors import StoreError, StoreUnavailableError
from workers.store import read_range
from workers.store.s3 import S3Store


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and self-signed certificate of 127.0.0.1, in one file."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(address, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(secret + signed.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture(scope="module")
def server(certificate: Path) -> Iterator[FaultyServer]:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    with faulty_server(tls) as server:
        yield server


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch, certificate: Path) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))


@pytest.fixture
def store(server: FaultyServer, trusted: None) -> Iterator[S3Store]:
    store = S3Store(settings_for(server.url, s3_read_timeout_s=5))
    yield store
    store.close()


def test_ranges_are_read(store: S3Store, server: FaultyServer) -> None:
    data = filled(3 << 20)
    server.restart(ranged(data, 0, len(data)))
    for _ in range(2):
        assert read_range(store, URI, 0, len(data), "e1") == data
    assert len(server.clients) == 1


def test_a_stranger_is_not_trusted(server: FaultyServer) -> None:
    server.restart(ranged(b"x", 0, 1))
    store = S3Store(settings_for(server.url))
    with pytest.raises(StoreError, match=r"CERTIFICATE_VERIFY_FAILED.*AWS_CA_BUNDLE") as caught:
        read_range(store, URI, 0, 1, "e1")
    assert not isinstance(caught.value, StoreUnavailableError)  # no retry makes it trusted
    store.close()
    assert server.requests == []


def test_a_confirmed_crc32_needs_nothing_else(store: S3Store, server: FaultyServer) -> None:
    server.restart(Answer(200, b"", {"ETag": '"not an md5"', "x-amz-checksum-crc32": "2cLpHg=="}))
    for number in (1, 2):
        assert store.put_part(UPLOAD, number, 0, b"some data").etag == "not an md5"
    for _, _, headers in server.requests:
        assert headers["x-amz-checksum-crc32"] == "2cLpHg=="
        assert headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
        assert "content-md5" not in headers


def test_an_unconfirmed_crc32_is_made_good_by_md5(store: S3Store, server: FaultyServer) -> None:
    server.restart(WRITTEN)
    store.put_part(UPLOAD, 1, 0, b"some data")
    store.put_part(UPLOAD, 2, 9, b"some data")
    sent = [("x-amz-checksum-crc32" in h, h.get("content-md5")) for _, _, h in server.requests]
    md5 = "HlAhCgICSX+3m8OLat5sNA=="
    assert sent == [(True, None), (False, md5), (False, md5)]
    assert {h["x-amz-content-sha256"] for _, _, h in server.requests} == {"UNSIGNED-PAYLOAD"}


def test_small_objects_carry_an_md5(store: S3Store, server: FaultyServer) -> None:
    server.restart(WRITTEN)
    store.put(URI, b"some data")
    assert server.requests[0][2]["content-md5"] == "HlAhCgICSX+3m8OLat5sNA=="


def test_older_servers_get_the_sha256_in_the_signature(server: FaultyServer, trusted: None) -> None:
    server.restart(WRITTEN)
    store = S3Store(settings_for(server.url, s3_checksums="when_required"))
    store.put_part(UPLOAD, 1, 0, memoryview(b"some data"))
    store.put(URI, b"some data")
    store.close()
    for _, _, headers in server.requests:
        assert headers["x-amz-content-sha256"] == hashlib.sha256(b"some data").hexdigest()
        assert headers.keys().isdisjoint({"content-md5", "x-amz-checksum-crc32"})
