"""Posting to strangers that do not behave: nothing is waited for beyond the deadline, nothing private is reached."""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any

import pytest

from service.webhooks import posting
from service.webhooks.addresses import Destinations
from service.webhooks.posting import Answer, post
from tests.servers.receiver import Behaviour, Receiver, closes, drips, pours, speaks_nonsense, status

LOOPBACK = Destinations.parse(["127.0.0.0/8", "::1"])


def send(receiver: Receiver, deadline_s: float = 5.0, destinations: Destinations = LOOPBACK) -> Answer:
    return post(receiver.url, {"webhook-id": "x"}, b"{}", destinations, deadline_s)


@pytest.mark.parametrize(
    ("behaviour", "expected", "why"),
    [
        (status(204), 204, None),
        (status(500), 500, "500"),
        (status(301, Location="http://127.0.0.1:1/"), 301, "301"),
        (status(307, Location="/elsewhere"), 307, "307"),
        (closes, None, "broke off"),
        (speaks_nonsense, None, "HTTP"),
        (pours, 200, None),
    ],
)
def test_only_the_status_counts(behaviour: Behaviour, expected: int | None, why: str | None) -> None:
    with Receiver(behaviour) as receiver:
        answer = send(receiver)
        assert len(receiver.received) == 1
    assert answer.status == expected
    assert answer.error is None if why is None else why in str(answer.error)


def test_a_body_that_never_ends_is_not_read() -> None:
    with Receiver(pours) as receiver:
        begun = time.monotonic()
        assert send(receiver, 30).status == 200
        assert time.monotonic() - begun < 5
    assert receiver.given_up == 1


@pytest.mark.parametrize("how", ["hangs", "drips"])
def test_the_deadline_is_for_all_of_it(how: str) -> None:
    with Receiver() as receiver:
        receiver._behaviours.append(receiver.hangs if how == "hangs" else drips)
        begun = time.monotonic()
        answer = send(receiver, 0.5)
        assert 0.4 < time.monotonic() - begun < 3
    assert answer == Answer(None, "it took too long")


def test_a_server_that_does_not_answer_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(3)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        begun = time.monotonic()
        answer = post(f"https://127.0.0.1:{port}/", {}, b"", LOOPBACK, 0.5)
        assert time.monotonic() - begun < 3
        assert answer == Answer(None, "it took too long")
        for client in waiting:
            client.close()


def test_what_is_sent() -> None:
    with Receiver() as receiver:
        post(f"{receiver.url}?a=%20b", {"webhook-id": "x"}, b'{"a": 1}', LOOPBACK)
        (got,) = receiver.received
    assert (got.path, got.body) == ("/hook?a=%20b", b'{"a": 1}')
    assert got.headers["host"] == receiver.url.split("/")[2]
    assert (got.headers["content-length"], got.headers["webhook-id"]) == ("8", "x")


class TestAddresses:
    @pytest.mark.parametrize(
        "host", ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "[::ffff:127.0.0.1]"]
    )
    def test_loopback_is_refused_however_it_is_written(self, host: str) -> None:
        with Receiver() as receiver:
            url = receiver.url.replace("127.0.0.1", host)
            answer = post(url, {}, b"", Destinations())
            assert receiver.received == []
        assert answer.status is None
        assert "not at a public address" in str(answer.error)
        assert "127.0.0.1" not in str(answer.error).replace(host.strip("[]"), "")

    def test_a_name_is_looked_up_once_and_that_very_address_is_connected_to(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """DNS rebinding: a name that is public when it is checked, and loopback when it is connected to."""
        answers = iter(["1.1.1.1", "127.0.0.1", "127.0.0.1"])
        asked, connected = [], []
        resolve = socket.getaddrinfo

        def rebinding(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if host != "rebind.test":
                return resolve(host, port, *args, **options)
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

        def connect(self: Any, host: str, *_: Any, **__: Any) -> Any:
            connected.append(host)
            raise OSError("nobody there")

        monkeypatch.setattr(socket, "getaddrinfo", rebinding)
        monkeypatch.setattr("httpcore.SyncBackend.connect_tcp", connect)
        post("https://rebind.test/", {}, b"", Destinations())
        assert (asked, connected) == (["rebind.test"], ["1.1.1.1"])
        assert "public" in str(post("https://rebind.test/", {}, b"", Destinations()).error)
        assert connected == ["1.1.1.1"]

    def test_of_several_addresses_only_public_ones_are_tried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tried = []
        addresses = ["10.0.0.1", "1.1.1.1", "169.254.169.254", "8.8.8.8"]
        monkeypatch.setattr(posting, "_resolve", lambda *_: addresses)

        def connect(self: Any, host: str, *_: Any, **__: Any) -> Any:
            tried.append(host)
            import httpcore

            raise httpcore.ConnectError("refused")

        monkeypatch.setattr("httpcore.SyncBackend.connect_tcp", connect)
        assert post("https://many.test/", {}, b"", Destinations()).error == "refused"
        assert tried == ["1.1.1.1", "8.8.8.8"]

    def test_a_proxy_of_the_environment_is_not_used(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with Receiver() as receiver, Receiver() as proxy:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, proxy.url)
            assert send(receiver).status == 204
            assert proxy.received == []

    def test_a_name_that_there_is_none_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def unknown(*_: Any, **__: Any) -> Any:
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", unknown)
        assert post("https://none.invalid/", {}, b"", LOOPBACK) == Answer(None, "its host name is not known")


def test_certificates_are_checked() -> None:
    context = posting._tls()
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    with Receiver() as receiver:  # it speaks no TLS at all
        answer = post(receiver.url.replace("http:", "https:"), {}, b"", LOOPBACK, 5)
        assert answer.status is None
        assert receiver.received == []
