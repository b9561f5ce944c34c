"""Bodies that cannot be taken, and why: each its own status, for both routes that take a recipe."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from api import bodies
from api.bodies import DRAINED_BYTES, MAX_BODY_BYTES

ROUTES = ("/v1/merges", "/v1/plans")
YAML = {"content-type": "application/yaml"}
JSON = {"content-type": "application/json"}
LINEAR: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "/a"}, {"model": "/b"}]}
LINEAR_YAML = b"merge_method: linear\nmodels: [{model: /nowhere/a}, {model: /nowhere/b}]\n"


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The problem that the answer is, whose status it has to be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    return body


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest) -> str:
    """Each route that takes a recipe."""
    found: str = request.param
    return found


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", LINEAR_YAML.decode().encode("utf-16"), b"merge_method: \xe4", b"\xed\xa0\x80"]
)
def test_yaml_that_is_not_utf8(lonely_api: httpx.Client, route: str, data: bytes) -> None:
    found = problem(lonely_api.post(route, params={"output": "/o"}, content=data, headers=YAML), 400)
    assert found["type"] == "urn:mergemill:error:malformed_request"
    assert "UTF-8" in found["detail"]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b'{"recipe": "\\ud800"}', b"merge_method: linear", b"[" * 100_000]
)
def test_json_that_is_none(lonely_api: httpx.Client, route: str, data: bytes) -> None:
    found = problem(lonely_api.post(route, content=data, headers=JSON), 400)
    assert found["title"] == "The request cannot be read"
    assert "JSON" in found["detail"]


@pytest.mark.parametrize("data", [b"[]", b"null", b"1", b'"x"', b"{}", b'{"recipe": {}, "output": 1}'])
def test_json_that_is_no_request(lonely_api: httpx.Client, route: str, data: bytes) -> None:
    assert problem(lonely_api.post(route, content=data, headers=JSON), 422)["errors"]


@pytest.mark.parametrize(
    "kind",
    ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/xml", "application/json5", "x"],
)  # fmt: skip
def test_other_types_are_refused_by_name(lonely_api: httpx.Client, route: str, kind: str) -> None:
    found = problem(lonely_api.post(route, content=b"x", headers={"content-type": kind}), 415)
    for word in (kind.partition(";")[0], "Content-Type", "application/json", "application/yaml"):
        assert word in found["detail"]


@pytest.mark.parametrize("kind", [YAML, JSON])
@pytest.mark.parametrize("length", [MAX_BODY_BYTES + 1, DRAINED_BYTES])
def test_long_bodies_are_not_read(
    lonely_api: httpx.Client, route: str, kind: dict[str, str], length: int
) -> None:
    found = problem(lonely_api.post(route, content=b" " * length, headers=kind), 413)
    assert str(MAX_BODY_BYTES) in found["detail"]
    chunks = (b" " * 100_000 for _ in range(length // 100_000 + 1))  # no Content-Length to go by
    problem(lonely_api.post(route, content=chunks, headers=kind), 413)


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x"])
def test_compressed_bodies_are_not_unpacked(lonely_api: httpx.Client, route: str, encoding: str) -> None:
    bomb = gzip.compress(b" " * (MAX_BODY_BYTES + 1))
    found = problem(lonely_api.post(route, content=bomb, headers=JSON | {"content-encoding": encoding}), 415)
    assert "Content-Encoding" in found["detail"]
    plain = JSON | {"content-encoding": "identity"}
    problem(lonely_api.post(route, json={"recipe": {}, "output": "/o"}, headers=plain), 422)


def raw(api: httpx.Client, data: bytes) -> bytes:
    """All that comes back over a connection of its own, until the server closes it."""
    with socket.create_connection((api.base_url.host, api.base_url.port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):  # it may have heard enough
            connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("framing", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_end_is_not_waited_for(
    lonely_api: httpx.Client, route: str, framing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{framing}\r\n\r\n"
    answer = raw(lonely_api, head.encode() + b"5\r\n")
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"urn:mergemill:error:request_timeout" in answer


@pytest.mark.parametrize(
    "head",
    [
        b"".join(b"X-%d: x\r\n" % number for number in range(100_000)),
        b"X: " + b"x" * (1 << 20) + b"\r\n",
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 1e3\r\n",
        b"Content-Length: %d\r\n" % 2**70,
        b"Transfer-Encoding: gzip\r\n",
    ],
    ids=["many", "long", "two lengths", "two framings", "negative", "float", "endless", "unknown"],
)
def test_headers_are_bounded_and_clear(
    lonely_api: httpx.Client, route: str, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "BODY_SECONDS", 0.2)
    try:
        answer = raw(
            lonely_api, b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s\r\n" % (route.encode(), head)
        )
    except ConnectionResetError:  # closed with much of it unread
        answer = b"HTTP/1.1 400 "
    assert answer.startswith(b"HTTP/1.1 4") or answer.startswith(b"HTTP/1.1 501 ")
    assert lonely_api.get("/healthz").status_code == 200


def test_the_longest_body_is_read(lonely_api: httpx.Client, route: str) -> None:
    assert problem(lonely_api.post(route, content=b" " * MAX_BODY_BYTES, headers=JSON), 400)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("charset", ["", "; charset=utf-8"])
def test_plans_are_made_from_either(lonely_api: httpx.Client, mark: bytes, charset: str) -> None:
    as_json = json.dumps({"recipe": LINEAR}).encode()
    for data, kind in ((LINEAR_YAML, "application/yaml"), (as_json, "application/json")):
        answer = lonely_api.post("/v1/plans", content=mark + data, headers={"content-type": kind + charset})
        found = problem(answer, 422)
        assert found["type"] == "urn:mergemill:error:plan"
        assert [text for text in found["errors"] if "no model here" in text] == found["errors"]
        assert len(found["errors"]) == 2


def test_a_body_without_a_type_is_json(lonely_api: httpx.Client) -> None:
    data = json.dumps({"recipe": LINEAR}).encode()
    request = lonely_api.build_request("POST", "/v1/plans", content=data)
    assert "content-type" not in request.headers
    assert problem(lonely_api.send(request), 422)["type"] == "urn:mergemill:error:plan"


def test_the_query_is_for_yaml(lonely_api: httpx.Client, route: str) -> None:
    body = {"recipe": LINEAR, "output": "/o"}
    for query in ({"output": "/p"}, {"overwrite": "false"}, {"part_bytes": "5"}):
        found = problem(lonely_api.post(route, params=query, json=body), 400)
        assert next(iter(query)) in found["detail"]


def test_a_misspelt_query_is_refused(lonely_api: httpx.Client, route: str) -> None:
    query = {"output": "/o", "overwrit": "true"}
    found = problem(lonely_api.post(route, params=query, content=LINEAR_YAML, headers=YAML), 422)
    assert found["errors"][0] == "query.overwrit: is not a parameter; did you mean `overwrite`?"


def test_a_misspelt_key_of_a_json_body_is_refused(lonely_api: httpx.Client, route: str) -> None:
    body = {"recipe": LINEAR, "output": "/o", "option": {}, "options": {"part_byte": 1}}
    assert sorted(problem(lonely_api.post(route, json=body), 422)["errors"]) == [
        "option: is not known; did you mean `options`?",
        "options.part_byte: is not known; did you mean `part_bytes`?",
    ]


def test_all_options_may_be_in_the_query(lonely_api: httpx.Client, route: str) -> None:
    query = {"output": "/o", "part_bytes": "1", "shard_bytes": "0", "worker_memory_bytes": "many"}
    found = problem(lonely_api.post(route, params=query, content=LINEAR_YAML, headers=YAML), 422)
    assert "worker_memory_bytes" in found["errors"][0]
    query["worker_memory_bytes"] = str(1 << 60)
    found = problem(lonely_api.post(route, params=query, content=LINEAR_YAML, headers=YAML), 422)
    assert [text.partition(":")[0] for text in found["errors"][:2]] == [
        "options.shard_bytes",
        "options.part_bytes",
    ]
    assert [text.partition(": ")[2][:13] for text in found["errors"][2:]] == ["no model here"] * 2


def test_everything_in_a_request_is_said_at_once(lonely_api: httpx.Client, route: str) -> None:
    body = {"recipe": {"merge_method": "liner"}, "output": "o", "options": {"part_bytes": 1}}
    found = " ".join(problem(lonely_api.post(route, json=body), 422)["errors"])
    for word in ("models", "output", "options.part_bytes"):
        assert word in found


def test_a_yaml_merge_needs_an_output(lonely_api: httpx.Client) -> None:
    found = problem(lonely_api.post("/v1/merges", content=b"merge_method: x", headers=YAML), 422)
    assert any("?output" in text or "`output`" in text for text in found["errors"])
    assert any("models" in text for text in found["errors"])


def test_thousands_of_problems_are_cut_short(lonely_api: httpx.Client, route: str) -> None:
    unknown = {f"unknown{number}": 1 for number in range(10_000)}
    found = problem(lonely_api.post(route, json={"recipe": LINEAR, "output": "/o"} | unknown), 422)
    assert len(found["errors"]) == 51
    assert found["errors"][-1] == "and 9950 more problem(s)"


def test_many_models_are_not_looked_into(lonely_api: httpx.Client, route: str) -> None:
    body = {"recipe": LINEAR | {"models": [{"modell": 1}] * 100_000}, "output": "/o"}
    begun = time.monotonic()
    found = problem(lonely_api.post(route, json=body), 422)
    assert found["errors"] == ["models: 100000 of them, more than the 64 that are read"]
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("place", ["parameters", "model"])
def test_many_names_keep_nobody_waiting(lonely_api: httpx.Client, route: str, place: str) -> None:
    many = {f"densit{number}": 0.5 for number in range(100_000)}
    recipe: dict[str, Any] = LINEAR | {"parameters": many} if place == "parameters" else dict(LINEAR)
    if place == "model":
        recipe["models"] = [{"model": "/a", "parameters": many}, {"model": "/b"}]
    answers: list[httpx.Response] = []
    body = {"recipe": recipe, "output": "/o"}
    begun = time.monotonic()
    posting = threading.Thread(target=lambda: answers.append(lonely_api.post(route, json=body)))
    posting.start()
    slowest = 0.0
    while posting.is_alive():
        asked = time.monotonic()
        assert lonely_api.get("/healthz").status_code == 200
        slowest = max(slowest, time.monotonic() - asked)
    posting.join()
    found = problem(answers[0], 422)
    assert any("100000 parameters" in text for text in found["errors"])
    assert time.monotonic() - begun < 10
    assert slowest < 3
