"""Webhooks over REST: which are taken, what is told of them, and that the secret never is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from api.app import create_app
from service.settings import Settings
from service.webhooks.courier import Courier
from service.webhooks.store import WebhookStore
from service.webhooks.webhooks import Backoff
from tests.api.conftest import serving
from tests.servers.receiver import Receiver, status

pytestmark = pytest.mark.valkey

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
RECIPE = {"merge_method": "linear", "models": [{"model": "/a"}, {"model": "/b"}]}


def post(api: httpx.Client, webhook: Any, output: str = "s3://bucket/out", **more: Any) -> httpx.Response:
    body = {"recipe": RECIPE, "output": output, "webhook": webhook}
    return api.post("/v1/merges", json=body, **more)


@pytest.fixture
def settings(valkey_url: str, valkey_namespace: str) -> Settings:
    return Settings(
        redis_url=valkey_url,
        namespace=valkey_namespace,
        auth="off",
        webhook_allow_private=("127.0.0.1",),
        webhook_secret=SECRET,
    )


@pytest.fixture
def lenient(settings: Settings) -> Iterator[httpx.Client]:
    """An API whose webhooks may go to loopback."""
    with serving(create_app(settings)) as api:
        yield api


@pytest.mark.parametrize(
    ("webhook", "about"),
    [
        ({"url": "http://example.com/", "secret": SECRET}, "webhook.url: only https"),
        ({"url": "https://10.0.0.1/", "secret": SECRET}, "webhook.url: it is not at a public address"),
        ({"url": "https://u:p@example.com/", "secret": SECRET}, "webhook.url: it holds a user"),
        ({"url": "https://example.com/"}, "webhook.secret: give one"),
        ({"url": "https://example.com/", "secret": "hunter2hunter2"}, "webhook.secret: it has to be whsec_"),
        ({"url": "https://example.com/", "secret": SECRET, "events": ["progress"]}, "no event 'progress'"),
        ({"url": "https://example.com/", "secret": SECRET, "events": []}, "webhook.events"),
        ({"url": "https://example.com/", "secret": SECRET, "x": 1}, "webhook.x"),
        ({"secret": SECRET}, "webhook.url"),
        ("https://example.com/", "webhook"),
    ],
)
def test_what_is_refused(
    api: httpx.Client, raw: redis.Redis, valkey_namespace: str, tmp_path: Path, webhook: Any, about: str
) -> None:
    answer = post(api, webhook, str(tmp_path / "out"))
    assert answer.status_code == 422
    assert any(about in problem for problem in answer.json()["errors"]), answer.text
    assert "hunter2" not in answer.text and SECRET[6:] not in answer.text
    assert not [key for key in raw.keys(f"{valkey_namespace}:*") if ":key" not in key]


def test_a_merge_without_one(api: httpx.Client) -> None:
    job = post(api, None).json()["id"]
    answer = api.get(f"/v1/merges/{job}/deliveries")
    assert answer.json() == {"url": None, "events": [], "deliveries": []}
    assert api.get("/v1/merges/merge-0" + "0" * 25 + "/deliveries").status_code == 404
    assert api.head(f"/v1/merges/{job}/deliveries").status_code == 200


def test_every_try_is_told(lenient: httpx.Client, settings: Settings) -> None:
    with (
        Receiver(status(503)) as receiver,
        WebhookStore(settings.redis_url, settings.namespace) as store,
        Courier(store, settings, backoff=Backoff(first_s=0.01)),
    ):
        job = post(lenient, {"url": receiver.url, "events": ["created", "created", "succeeded"]}).json()
        receiver.wait_for(2)
    found = lenient.get(job["links"]["deliveries"]).json()
    assert (found["url"], found["events"]) == (receiver.url, ["created", "succeeded"])
    (delivery,) = found["deliveries"]
    assert delivery["id"] == receiver.received[0].headers["webhook-id"]
    assert (delivery["event"], delivery["state"], delivery["next_try_at"]) == ("created", "delivered", None)
    first, second = delivery["tries"]
    assert (first["number"], first["status"], first["error"]) == (1, 503, "the answer was 503")
    assert first["at"] < first["next_try_at"] <= second["at"]
    assert (second["number"], second["status"], second["error"], second["next_try_at"]) == (
        2,
        204,
        None,
        None,
    )


def test_what_waits_says_when(lenient: httpx.Client) -> None:
    job = post(lenient, {"url": "http://127.0.0.1:9/", "events": ["created"]}).json()
    (delivery,) = lenient.get(job["links"]["deliveries"]).json()["deliveries"]
    assert (delivery["state"], delivery["tries"]) == ("pending", [])
    assert delivery["next_try_at"] is not None


def test_the_secret_is_shown_nowhere(lenient: httpx.Client) -> None:
    secret = "whsec_" + "c2VjcmV0" * 5
    job = post(
        lenient, {"url": "http://127.0.0.1:9/", "secret": secret, "events": ["created", "cancelled"]}
    ).json()
    here = f"/v1/merges/{job['id']}"
    lenient.post(f"{here}/cancel")
    shown = [lenient.get(path).text for path in (here, f"{here}/events", f"{here}/deliveries", "/v1/merges")]
    assert all(secret not in text and "whsec_" not in text for text in [str(job), *shown])


def test_a_replayed_request_is_told_of_once(lenient: httpx.Client) -> None:
    webhook = {"url": "http://127.0.0.1:9/", "events": ["created"]}
    jobs = {post(lenient, webhook, headers={"Idempotency-Key": "k"}).json()["id"] for _ in range(3)}
    (job,) = jobs
    assert len(lenient.get(f"/v1/merges/{job}/deliveries").json()["deliveries"]) == 1
    other = post(lenient, {**webhook, "url": "http://127.0.0.1:10/"}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 422


def test_a_plan_has_no_webhook(api: httpx.Client) -> None:
    answer = api.post("/v1/plans", json={"recipe": RECIPE, "webhook": {"url": "https://example.com"}})
    assert answer.status_code == 422
