"""No secret comes out: not in a log of any process, a record, a manifest, an answer or a command line."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
import torch

from service.cluster.driver import Driver
from service.valkey import EmbeddedValkey
from service.watching import logs
from tests.checkpoints import fine_tune, llama_tensors, write_checkpoint
from tests.servers.moto import running_moto
from tests.servers.rgw_fixtures import client_of, make_bucket
from tests.servers.service import RunningService, running_service
from workers.store import StoreSettings, open_stores

SECRETS = {"key": "marked-secret-key-5f3a", "token": "marked-session-token-9c1e"}


@pytest.fixture
def settings() -> Iterator[StoreSettings]:
    """A store that wants marked credentials."""
    marked = {
        "s3_access_key_id": "AKIAMARKED",
        "s3_secret_access_key": SECRETS["key"],
        "s3_session_token": SECRETS["token"],
    }
    with running_moto(**marked) as settings:
        yield settings


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """What the API and the scheduler print, with logs set up as their commands do."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, {name: logging.getLogger(name).level for name in logs._QUIET})
    logs.configure("json", logging.DEBUG)
    structlog.configure(cache_logger_on_first_use=False)  # what is cached would outlive this test
    try:
        yield capfd
    finally:
        structlog.reset_defaults()
        root.handlers[:], level, quiet = before
        root.setLevel(level)
        for name, was in quiet.items():
            logging.getLogger(name).setLevel(was)


def upload(settings: StoreSettings, uri: str, directory: Path) -> None:
    bucket = uri.removeprefix("s3://").partition("/")[0]
    with client_of(settings) as client:
        for file in directory.iterdir():
            client.upload_file(str(file), bucket, f"{directory.name}/{file.name}")


def recorded(url: str, namespace: str) -> str:
    """Everything that Redis holds for a namespace."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        found: dict[str, Any] = {}
        read = {"string": client.get, "hash": client.hgetall, "set": client.smembers,
                "zset": lambda key: client.zrange(key, 0, -1), "list": lambda key: client.lrange(key, 0, -1),
                "stream": client.xrange}  # fmt: skip
        for key in client.scan_iter(f"{namespace}*"):
            found[key] = read[client.type(key)](key)
    return repr(found)


def answers(service: RunningService, jobs: list[str]) -> str:
    paths = ["/v1/merges", "/readyz", *(f"/v1/merges/{job}" for job in jobs), "/v1/merges/none"]
    listing = service.http.get(f"/v1/merges/{jobs[0]}/files").json()
    for file in listing["files"]:
        assert file.pop("url")  # a presigned URL is a key to this one file, and carries the session's token
    return "\n".join([*(service.http.get(path).text for path in paths), json.dumps(listing)])


def test_no_secret_comes_out(
    valkey_server: EmbeddedValkey,
    driver: Driver,
    settings: StoreSettings,
    tmp_path: Path,
    said: pytest.CaptureFixture[str],
) -> None:
    bucket = make_bucket(settings)
    tensors = llama_tensors(0, layers=1, hidden=16, heads=2, vocab=32, dtype=torch.float32)
    broken = {name: tensor.clone() for name, tensor in tensors.items()}
    next(iter(broken.values())).flatten()[0] = float("nan")
    for name, value in {"base": tensors, "one": fine_tune(tensors, 1, 0.1), "broken": broken}.items():
        write_checkpoint(tmp_path / name, value)
        upload(settings, bucket, tmp_path / name)

    def recipe(other: str) -> dict[str, Any]:
        return {
            "merge_method": "linear",
            "models": [{"model": f"{bucket}/base"}, {"model": f"{bucket}/{other}"}],
        }

    url = valkey_server.url
    with running_service(url, driver, settings) as service:
        done = service.merge(recipe("one"), f"{bucket}/out")
        ended = [service.submit(recipe(name), f"{bucket}/{name}-out")["id"] for name in ("broken", "missing")]
        assert [service.wait(job)["state"] for job in ended] == ["failed", "failed"]
        refused = service.http.post(
            "/v1/plans", json={"recipe": recipe("missing"), "output": f"{bucket}/out"}
        )
        seen = {
            "answers": answers(service, [done["id"], *ended]) + refused.text,
            "Redis": recorded(url, service.settings.namespace),
        }
        assert driver._child is not None
        place = driver._child._log.parent
        seen |= {str(path): path.read_text(errors="replace") for path in place.rglob("*.log")}
        seen |= {str(path): path.read_text(errors="replace") for path in place.rglob("*.out")}
        seen |= {str(path): path.read_text(errors="replace") for path in place.rglob("*.err")}
    with closing(open_stores(settings)) as store:
        for info in store.list(f"{bucket}/out/"):
            if not info.uri.endswith(".safetensors"):
                data = bytearray(info.size)
                store.read_into(info.uri, 0, memoryview(data))
                seen[info.uri] = data.decode()
    seen["Valkey's log"] = valkey_server.log_path.read_text()
    seen["printed"] = "".join(said.readouterr())
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            seen[str(path)] = path.read_text(errors="replace")
        except OSError:  # it has ended
            continue
    assert any(name.endswith("driver.log") for name in seen)
    assert any(name.endswith("mergemill.json") for name in seen)
    assert "NonFiniteError" in seen["Redis"]
    assert "job failed" in seen["printed"]
    password = url.removeprefix("redis://:").partition("@")[0]
    own = {"password of Redis": password, "API key": service.api_key.rpartition("_")[2]}
    for what, secret in {**SECRETS, **own}.items():
        assert len(secret) > 10
        assert [where for where, text in seen.items() if secret in text] == [], what
