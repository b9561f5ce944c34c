"""The proxy does to requests what it is told to, and nothing else."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.chaos.fault_proxy import FaultProxy
from tests.chaos.faults import Calm, Fault, Kind, Request, Script, Storm, operation_of
from tests.workers.store.faulty import Answer, FaultyServer, faulty_server

OBJECT = b"0123456789" * 100_000
GET = ("GET", "/bucket/object", None)
PUT = ("PUT", "/bucket/object?partNumber=1&uploadId=u", OBJECT)


@pytest.fixture(scope="module")
def server() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        yield server


@pytest.fixture
def proxy(server: FaultyServer, tmp_path: Path) -> Iterator[FaultProxy]:
    server.restart(Answer(206, OBJECT, {"ETag": '"e"'}))
    with FaultProxy(server.url, Calm(), tmp_path / "journal") as proxy:
        yield proxy


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    with closing(http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=5)) as connection:
        yield connection


def ask(client: http.client.HTTPConnection, what: tuple[str, str, bytes | None]) -> tuple[int, bytes]:
    method, target, body = what
    client.request(method, target, body)
    answer = client.getresponse()
    return answer.status, answer.read()


def test_what_meets_no_fault_goes_through_unchanged(
    proxy: FaultProxy, client: http.client.HTTPConnection, server: FaultyServer
) -> None:
    assert ask(client, GET) == ask(client, PUT) == (206, OBJECT)
    assert ask(client, ("HEAD", "/bucket/object", None)) == (206, b"")
    assert server.methods == ["GET", "PUT", "HEAD"]
    assert server.bodies == [b"", OBJECT, b""]
    assert server.requests[0][2]["host"] == f"127.0.0.1:{proxy.port}"  # as it was signed
    assert proxy.requests == {"GET": 1, "UploadPart": 1, "HEAD": 1}
    assert not proxy.injected


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (Kind.INTERNAL_ERROR, 500, b"InternalError"),
        (Kind.SLOW_DOWN, 503, b"SlowDown"),
        (Kind.EXPIRED_TOKEN, 403, b"ExpiredToken"),
    ],
)
def test_errors_are_answered_in_the_servers_place(
    proxy: FaultProxy,
    client: http.client.HTTPConnection,
    server: FaultyServer,
    kind: Kind,
    status: int,
    code: bytes,
) -> None:
    proxy.policy = Script([Fault(kind, retry_after_s=7)])
    client.request(*PUT, headers={"Expect": "100-continue"})
    answer = client.getresponse()
    assert (answer.status, answer.getheader("Retry-After")) == (status, "7")
    assert code in answer.read()
    assert server.requests == []
    assert ask(client, GET) == (206, OBJECT)  # on the same connection
    assert proxy.injected == {kind: 1}


@pytest.mark.parametrize("kind", [Kind.RESET, Kind.LOSE_ANSWER, Kind.ACT_LATE, Kind.CUT_REQUEST])
def test_cut_connections(
    proxy: FaultProxy, client: http.client.HTTPConnection, server: FaultyServer, kind: Kind
) -> None:
    proxy.policy = Script([Fault(kind, seconds=0.2)])
    begin = time.monotonic()
    with pytest.raises(OSError):
        ask(client, PUT)
    assert time.monotonic() - begin < 2
    if kind == Kind.ACT_LATE:
        assert server.requests == []
    deadline = time.monotonic() + 5
    while kind in {Kind.LOSE_ANSWER, Kind.ACT_LATE} and not server.requests:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.bodies[:1] == ([OBJECT] if kind in {Kind.LOSE_ANSWER, Kind.ACT_LATE} else [])
    client.close()
    assert ask(client, GET) == (206, OBJECT)
    assert proxy.injected == {kind: 1}


def test_bodies_that_end_early_stop_or_change(
    proxy: FaultProxy, client: http.client.HTTPConnection, server: FaultyServer
) -> None:
    proxy.policy = Script(
        [
            Fault(Kind.TRUNCATE, at=0.25),
            Fault(Kind.STALL, 0.3),
            Fault(Kind.FLIP, at=0.5, bit=2),
            Fault(Kind.FLIP),
        ]
    )
    with pytest.raises(http.client.IncompleteRead) as caught:
        ask(client, GET)
    assert caught.value.partial == OBJECT[:250_000]
    client.close()
    begin = time.monotonic()
    assert ask(client, GET) == (206, OBJECT)
    assert time.monotonic() - begin > 0.3
    _, flipped = ask(client, GET)
    assert [(at, a ^ b) for at, (a, b) in enumerate(zip(flipped, OBJECT, strict=True)) if a != b] == [
        (500_000, 4)
    ]
    assert ask(client, ("HEAD", "/bucket/object", None)) == (206, b"")
    assert proxy.injected == {
        Kind.TRUNCATE: 1,
        Kind.STALL: 1,
        Kind.FLIP: 1,
    }  # an empty body has no bit to flip
    proxy.policy = Script([Fault(Kind.FLIP_REQUEST, at=0.999999)])
    ask(client, PUT)
    assert server.bodies[-1] == OBJECT[:-1] + b"8"


def test_a_request_is_held_until_it_is_dropped(
    proxy: FaultProxy, client: http.client.HTTPConnection, server: FaultyServer, tmp_path: Path
) -> None:
    proxy.policy = Script([Fault(Kind.HOLD)], lambda request: request.operation == "UploadPart")
    assert ask(client, GET) == (206, OBJECT)
    client.request(*PUT)
    deadline = time.monotonic() + 5
    while not proxy.held:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (proxy.held[0].key, proxy.held[0].client) == ("object", client.sock.getsockname()[1])
    proxy.release()
    with pytest.raises(OSError):
        client.getresponse()
    assert server.methods == ["GET"]
    (line,) = (tmp_path / "journal").read_text().splitlines()
    noted = json.loads(line)
    assert (noted["kind"], noted["operation"], noted["number"]) == ("hold", "UploadPart", 1)


def test_all_connections_can_be_cut_at_once(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    assert ask(client, GET) == (206, OBJECT)
    assert proxy.reset() == 1
    with pytest.raises(OSError):
        ask(client, GET)


def requests(count: int) -> Iterator[Request]:
    """Requests for different objects, each sent four times."""
    for number in range(count):
        for nth in range(4):
            for method in ("GET", "PUT", "DELETE", "POST"):
                headers = {"content-length": "5"} if method == "PUT" else {}
                query = {"uploadId": "u"} if method == "POST" else {}
                yield Request(
                    0, nth, method, operation_of(method, query), f"/bucket/{number}", query, headers
                )


def test_a_storm_follows_from_its_seed_and_leaves_a_way_out() -> None:
    rates = dict.fromkeys(Kind, 0.07)
    storm = Storm(1, rates)
    found = [(request, storm.decide(request)) for request in requests(200)]
    assert found == [(request, Storm(1, rates).decide(request)) for request in requests(200)]
    assert found != [(request, Storm(2, rates).decide(request)) for request in requests(200)]
    met = {(request.method, fault.kind) for request, fault in found if fault is not None}
    assert {kind for _, kind in met} == set(Kind)
    assert {method for method, kind in met if kind in {Kind.FLIP, Kind.STALL, Kind.TRUNCATE}} == {"GET"}
    assert {method for method, kind in met if kind in {Kind.FLIP_REQUEST, Kind.CUT_REQUEST}} == {"PUT"}
    assert not {("DELETE", Kind.ACT_LATE), ("PUT", Kind.ACT_LATE)} & met
    assert not any(fault for request, fault in found if request.nth == 3)
    renamed = Request(9, 1, "GET", "GET", "/other-bucket/7")
    assert storm.decide(renamed) == storm.decide(Request(0, 1, "GET", "GET", "/bucket/7"))
    assert Storm(1, rates, spared={"GET"}).decide(renamed) is None
