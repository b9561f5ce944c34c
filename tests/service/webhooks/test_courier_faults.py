"""Couriers that are killed, and a Redis that goes away: what was queued is delivered."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from service.jobs.jobstore import JobStore
from service.valkey import EmbeddedValkey
from service.webhooks import courier as couriers
from service.webhooks.store import WebhookStore
from service.webhooks.webhooks import Backoff
from tests.servers.receiver import Receiver, status
from tests.service.couriers import cancelled, courier, ended, until

pytestmark = pytest.mark.valkey


@pytest.fixture
def store(valkey_url: str, valkey_namespace: str) -> Iterator[WebhookStore]:
    with WebhookStore(valkey_url, valkey_namespace) as found:
        yield found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(couriers, "POLL_S", 0.01)


KILLED = """
import os, signal, sys
from types import SimpleNamespace  # for settings, whose import takes seconds
from service.webhooks.addresses import Destinations
from service.webhooks.courier import Courier
from service.webhooks.store import WebhookStore

settings = SimpleNamespace(webhook_secret=None, webhook_destinations=Destinations.parse(["127.0.0.1"]))

WebhookStore.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with WebhookStore(sys.argv[1], sys.argv[2]) as store:
    with Courier(store, settings, threads=1, claim_s=0.5):
        signal.pause()
"""


def test_a_courier_that_is_killed_before_it_recorded_is_followed_by_another(
    job_store: JobStore, store: WebhookStore, valkey_url: str
) -> None:
    with Receiver() as receiver:
        name = cancelled(job_store, receiver.url)
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, valkey_url, job_store._namespace], timeout=60, check=False
        )
        assert killed.returncode == -9
        (first,) = receiver.received
        assert store.deliveries(name).deliveries[0].tries == ()
        with courier(store):
            done = ended(store, name)
        second = receiver.received[1]
    assert first.headers["webhook-id"] == second.headers["webhook-id"] == done.id
    assert first.body == second.body
    assert (done.state, [t.number for t in done.tries], len(receiver.received)) == ("delivered", [2], 2)


def test_redis_that_goes_away_is_waited_for(tmp_path: Any) -> None:
    with EmbeddedValkey(tmp_path) as server, Receiver(status(500)) as receiver:
        url, port = server.url, server.port
        with JobStore(url) as jobs, WebhookStore(url) as store:
            name = cancelled(jobs, receiver.url)
            with courier(store, backoff=Backoff(first_s=0.5)):
                until(lambda: store.deliveries(name).deliveries[0].tries)
                server._process.kill()
                server._process.wait()
                with EmbeddedValkey(tmp_path, port):
                    done = ended(store, name)
                    assert (done.state, len(done.tries)) == ("delivered", 2)
    assert json.loads(receiver.received[1].body)["data"]["job"] == name
