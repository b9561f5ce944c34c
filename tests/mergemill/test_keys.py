"""`mergemill keys`, where `serve` may listen, the stack's own key, and where a client sends its key."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from mergemill import Client, cli
from mergemill.exposure import check_exposure, is_loopback
from mergemill.stack_key import KEY_FILE, own_key, revoke_own
from service.keys import Scope, is_secret_of, split_token
from service.keystore import KeyStore
from service.settings import Settings
from tests.servers.keys import make_key
from workers.errors import (
    ExposedError,
    ForbiddenError,
    MergemillError,
    TooManyRequestsError,
    UnauthenticatedError,
)

pytestmark = pytest.mark.valkey


class Operator:
    """Runs the command against a Redis of its own."""

    def __init__(self, url: str, namespace: str) -> None:
        self.keys = KeyStore(url, namespace)
        self._env = {"MERGEMILL_REDIS_URL": url, "MERGEMILL_NAMESPACE": namespace}

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(cli.app, ["keys", *arguments], env=self._env)


@pytest.fixture
def operator(valkey_url: str, valkey_namespace: str) -> Operator:
    return Operator(valkey_url, valkey_namespace)


def test_a_token_is_all_that_create_prints_and_is_shown_once(operator: Operator) -> None:
    made = operator.run("create", "ann", "--input", "s3://b/models/", "--output", "s3://b/ann", "--expires", "90d",
                        "--queued-jobs", "5", "--input-bytes", "2GB")  # fmt: skip
    assert made.exit_code == 0, made.output
    name, secret = split_token(made.stdout.removesuffix("\n")) or ("", "")
    key = operator.keys.get(name)
    assert key is not None
    assert is_secret_of(secret, key)
    assert (key.name, key.scopes) == ("ann", (Scope.READ, Scope.SUBMIT))
    assert (key.inputs, key.outputs) == (("s3://b/models",), ("s3://b/ann",))
    assert key.limits == {"queued_jobs": 5, "input_bytes": 2 * 10**9}
    assert key.expires_at == pytest.approx(time.time() + 90 * 86400, abs=60)
    for listed in (operator.run("list"), operator.run("list", "--json")):
        assert listed.exit_code == 0
        assert name in listed.stdout
        assert secret not in listed.output
        assert key.digest not in listed.output


def test_an_admin_may_go_everywhere_and_others_nowhere_by_themselves(operator: Operator) -> None:
    admin = json.loads(operator.run("create", "root", "--scope", "admin", "--json").stdout)
    assert (admin["scopes"], admin["inputs"], admin["outputs"]) == (["admin"], ["*"], ["*"])
    assert admin["token"].startswith(f"mm_{admin['id']}_")
    other = operator.run("create", "bob")
    assert "nowhere" in other.stderr
    key = operator.keys.get((split_token(other.stdout.strip()) or ("", ""))[0])
    assert key is not None
    assert (key.inputs, key.outputs) == ((), ())
    assert json.loads(operator.run("list", "--json").stdout)[0]["state"] == "active"


def test_revoke(operator: Operator) -> None:
    made = json.loads(operator.run("create", "ann", "--json").stdout)
    assert operator.run("revoke", made["id"]).exit_code == 0
    assert json.loads(operator.run("list", "--json").stdout)[0]["state"] == "revoked"
    nobody = operator.run("revoke", "0" * 12)
    assert nobody.exit_code == 1
    assert "no key" in nobody.output


@pytest.mark.parametrize(
    "arguments",
    [["--scope", "root"], ["--input", "gs://x"], ["--output", "hub:"], ["--expires", "1y"], ["--expires", "0d"],
     ["--queued-jobs", "-1"], ["--requests-per-second", "inf"], ["--input-bytes", "much"]],
)  # fmt: skip
def test_keys_that_cannot_be(operator: Operator, arguments: list[str]) -> None:
    found = operator.run("create", "ann", *arguments)
    assert found.exit_code == 2, found.output
    assert operator.keys.list() == []


def test_relative_prefixes_are_directories_here(
    operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = json.loads(operator.run("create", "a", "--input", "models", "--output", "./out", "--json").stdout)
    assert (made["inputs"], made["outputs"]) == (
        [(tmp_path / "models").as_uri()],
        [(tmp_path / "out").as_uri()],
    )


# Where it may listen


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("", False), ("10.1.2.3", False), ("::ffff:10.1.2.3", False), ("no-such-host.invalid", False)],
)  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_beyond_loopback_there_must_be_a_good_key(valkey_url: str, valkey_namespace: str) -> None:
    settings = Settings(redis_url=valkey_url, namespace=valkey_namespace)
    check_exposure("127.0.0.1", settings)
    check_exposure("127.0.0.1", settings.model_copy(update={"auth": "off"}))
    with pytest.raises(ExposedError, match="mergemill keys create admin"):
        check_exposure("0.0.0.0", settings)
    token = make_key(valkey_url, valkey_namespace)
    check_exposure("0.0.0.0", settings)
    with pytest.raises(ExposedError, match="MERGEMILL_AUTH=keys"):
        check_exposure("0.0.0.0", settings.model_copy(update={"auth": "off"}))
    revoke_own(token, valkey_url, valkey_namespace)
    with pytest.raises(ExposedError):
        check_exposure("::", settings)


def test_serve_refuses_before_it_listens(valkey_url: str, valkey_namespace: str) -> None:
    env = {**os.environ, "MERGEMILL_REDIS_URL": valkey_url, "MERGEMILL_NAMESPACE": valkey_namespace,
           "MERGEMILL_HOST": "0.0.0.0", "MERGEMILL_PORT": "0"}  # fmt: skip
    command = [sys.executable, "-m", "mergemill", "serve"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "mergemill keys create admin --scope admin" in " ".join(done.stderr.split())


# The stack's own key


def test_the_stacks_key_is_private_and_kept(tmp_path: Path, valkey_url: str, valkey_namespace: str) -> None:
    token = own_key(tmp_path, valkey_url, valkey_namespace)
    path = tmp_path / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == f"{token}\n"
    assert own_key(tmp_path, valkey_url, valkey_namespace) == token
    assert [each.name for each in tmp_path.iterdir()] == [KEY_FILE]
    path.chmod(0o644)  # others may have read it
    another = own_key(tmp_path, valkey_url, valkey_namespace)
    assert another != token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    revoke_own(another, valkey_url, valkey_namespace)
    assert own_key(tmp_path, valkey_url, valkey_namespace) != another
    assert own_key(tmp_path, valkey_url, f"{valkey_namespace}-2") != path  # another Redis knows another key
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    own_key(tmp_path, valkey_url, valkey_namespace)
    assert not path.is_symlink()
    assert not (tmp_path / "elsewhere").exists()


# Where a client sends its key

TOKEN = f"mm_{'0' * 12}_{'0' * 64}"


def test_a_key_goes_to_the_service_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((str(request.url), request.headers.get("authorization")))
        if request.url.path == "/away":
            return httpx.Response(307, headers={"location": "http://store.test:8080/bucket/key?signature=x"})
        return httpx.Response(200, json=[])

    monkeypatch.setenv("MERGEMILL_API_KEY", f"{TOKEN}\n")
    with Client("http://api.test:8080", transport=httpx.MockTransport(answer)) as client:
        client.methods()
        client._http.get("http://store.test:8080/bucket/key")
        client._http.get("http://api.test:81/bucket/key")
        client._http.get("/away", follow_redirects=True)
    sent = [header for _, header in seen]
    assert sent == [f"Bearer {TOKEN}", None, None, f"Bearer {TOKEN}", None]
    assert TOKEN not in repr(client)
    with Client("http://api.test", api_key="mm_other", transport=httpx.MockTransport(answer)) as client:
        client.methods()
    assert seen[-1][1] == "Bearer mm_other"
    monkeypatch.delenv("MERGEMILL_API_KEY")
    with Client("http://api.test", transport=httpx.MockTransport(answer)) as client:
        client.methods()
    assert seen[-1][1] is None


@pytest.mark.parametrize("key", ["a b", "a\nb", "é", "a\x7fb"])
def test_what_cannot_be_a_key(key: str) -> None:
    with pytest.raises(MergemillError, match="MERGEMILL_API_KEY"):
        Client("http://api.test", api_key=key)


@pytest.mark.parametrize(
    ("status", "kind"), [(401, UnauthenticatedError), (403, ForbiddenError), (429, TooManyRequestsError)]
)
def test_refusals_are_errors_of_their_own(status: int, kind: type[MergemillError]) -> None:
    code = kind("x").code
    problem = {
        "type": f"urn:mergemill:error:{code}",
        "title": "t",
        "status": status,
        "detail": "a; b",
        "errors": ["a", "b"],
    }
    transport = httpx.MockTransport(lambda _: httpx.Response(status, json=problem))
    with Client("http://api.test", transport=transport) as client, pytest.raises(kind) as caught:
        client.methods()
    assert str(caught.value) == "a; b"
    if isinstance(caught.value, ForbiddenError):
        assert caught.value.problems == ("a", "b")
