"""Who is let in: every route of the document wants a key, and each refusal says why."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api.app import create_app
from service.keys import new_key, split_token
from service.keystore import KeyStore
from service.settings import Settings
from tests.api.conftest import serving
from tests.servers.keys import bearer, make_key

pytestmark = pytest.mark.valkey

OPEN = {"/healthz", "/readyz"}
PROBLEM = "application/problem+json"


@pytest.fixture
def keys(valkey_url: str, valkey_namespace: str) -> Iterator[KeyStore]:
    with KeyStore(valkey_url, valkey_namespace) as store:
        yield store


def routes(api: httpx.Client) -> list[tuple[str, str, dict[str, Any]]]:
    """Every operation of the document, with something in place of its parameters."""
    paths = api.get("/openapi.json", headers={"authorization": ""}).json()["paths"]
    fills = {"{job}": "merge-0" + "0" * 25, "{name}": "config.json"}
    found = []
    for path, operations in paths.items():
        for method, operation in operations.items():
            place = path
            for name, fill in fills.items():
                place = place.replace(name, fill)
            found.append((method.upper(), place, operation))
            if method == "get":
                found.append(("HEAD", place, operation))
    return found


def refused(answer: httpx.Response, method: str, status: int, code: str) -> None:
    assert answer.status_code == status, (method, answer.url, answer.text)
    assert answer.headers["content-type"] == PROBLEM
    if method != "HEAD":
        assert answer.json()["type"] == f"urn:mergemill:error:{code}"


def test_every_route_but_the_health_checks_wants_a_key(api: httpx.Client) -> None:
    found = routes(api)
    assert len(found) > 12
    for method, path, operation in found:
        answer = api.request(method, path, headers={"authorization": ""})
        if path in OPEN:
            assert answer.status_code == 200
            assert "security" not in operation
        else:
            refused(answer, method, 401, "unauthenticated")
            assert answer.headers["www-authenticate"] == 'Bearer realm="mergemill"'
            assert operation["security"] == [{"ApiKey": []}]
    for path in ("/openapi.json", "/docs", "/v1/healthz", "/v1/readyz", "/metrics"):
        assert api.get(path, headers={"authorization": ""}).status_code == 200
    document = api.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"


def test_what_is_no_good_key(
    api: httpx.Client, valkey_url: str, valkey_namespace: str, keys: KeyStore
) -> None:
    token = make_key(valkey_url, valkey_namespace)
    name, secret = split_token(token) or ("", "")
    other, _ = split_token(make_key(valkey_url, valkey_namespace)) or ("", "")
    wrong = [
        token, f"Basic {token}", "Bearer", f"Bearer {token}0", f"Bearer {token[:-1]}", f"Bearer {token} x",
        f"Bearer mm_{other}_{secret}", f"Bearer mm_{'0' * 12}_{secret}", f"Bearer mm_{name}_{'0' * 64}",
        f"Bearer {token}, Bearer {token}", "Bearer " + "x" * 5000,
    ]  # fmt: skip
    for header in wrong:
        answer = api.get("/v1/methods", headers={"authorization": header})
        refused(answer, "GET", 401, "unauthenticated")
        assert secret not in answer.text
    twice = [("authorization", f"Bearer {token}")] * 2
    bare = httpx.get(f"{api.base_url}/v1/methods", headers=twice)
    refused(bare, "GET", 401, "unauthenticated")
    assert api.get("/v1/methods", headers=bearer(token)).status_code == 200
    assert api.get("/v1/methods", headers={"authorization": f"bearer   {token}"}).status_code == 200
    assert api.get(f"/v1/methods?access_token={token}", headers={"authorization": ""}).status_code == 401


def test_a_revoked_and_an_expired_key_are_refused_at_once(
    api: httpx.Client, keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, token = new_key("a", ["admin"], time.time(), lasts_s=3600)  # type: ignore[list-item]
    keys.create(made)
    assert api.get("/v1/merges", headers=bearer(token)).status_code == 200
    now = time.time()
    with monkeypatch.context() as patch:
        patch.setattr("api.auth.time.time", lambda: now + 3601)
        answer = api.get("/v1/merges", headers=bearer(token))
    refused(answer, "GET", 401, "unauthenticated")
    assert "has expired" in answer.json()["detail"]
    assert api.get("/v1/merges", headers=bearer(token)).status_code == 200
    keys.revoke(made.id, time.time())
    answer = api.get("/v1/merges", headers=bearer(token))
    refused(answer, "GET", 401, "unauthenticated")
    assert "was revoked" in answer.json()["detail"]


def test_scopes(api: httpx.Client, valkey_url: str, valkey_namespace: str) -> None:
    tokens = {scope: make_key(valkey_url, valkey_namespace, [scope]) for scope in ("read", "submit", "admin")}
    for method, path, _ in routes(api):
        if path in OPEN:
            continue
        wanted = "read" if method in {"GET", "HEAD"} else "submit"
        for scope, token in tokens.items():
            answer = api.request(method, path, headers=bearer(token))
            if scope in {wanted, "admin"}:
                assert answer.status_code not in {401, 403}, (method, path, scope)
            else:
                refused(answer, method, 403, "forbidden")


def test_too_many_requests(api: httpx.Client, valkey_url: str, valkey_namespace: str) -> None:
    token = make_key(valkey_url, valkey_namespace, limits={"requests_per_second": 1})
    answers = [api.get("/v1/methods", headers=bearer(token)) for _ in range(2)]
    while answers[-1].status_code == 200 and len(answers) < 50:
        answers.append(api.get("/v1/methods", headers=bearer(token)))
    assert answers[0].headers["ratelimit-limit"] == "2"
    assert answers[0].headers["ratelimit-remaining"] == "1"
    assert 0 <= int(answers[0].headers["ratelimit-reset"]) <= 2
    refused(answers[-1], "GET", 429, "too_many_requests")
    assert answers[-1].headers["retry-after"] == "1"
    assert answers[-1].headers["ratelimit-remaining"] == "0"
    other = make_key(valkey_url, valkey_namespace)
    assert "ratelimit-limit" not in api.get("/v1/methods", headers=bearer(other)).headers
    name, _ = split_token(token) or ("", "")
    stranger = api.get("/v1/methods", headers=bearer(f"mm_{name}_{'0' * 64}"))
    assert stranger.status_code == 401  # who does not know the secret takes nothing of the key's requests


def test_no_redis_is_no_way_in() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("service.keystore.CONNECTION_TRIES", 0)
        app = create_app(Settings(redis_url="redis://127.0.0.1:1"))
        with serving(app) as client:
            answer = client.get("/v1/methods", headers=bearer(f"mm_{'0' * 12}_{'0' * 64}"))
    refused(answer, "GET", 503, "job_store_unavailable")
