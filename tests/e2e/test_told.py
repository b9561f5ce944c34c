"""A real merge as those who follow it are told: its events, the client that waits for them, and its webhook."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from standardwebhooks import Webhook as Verifier

from mergemill import Client, Job
from service.jobs.record import new_job
from service.settings import Settings
from service.webhooks.courier import Courier
from service.webhooks.store import WebhookStore
from service.webhooks.webhooks import Webhook
from tests.checkpoints import fine_tune, write_checkpoint
from tests.servers.receiver import Receiver
from tests.servers.service import RunningService

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_a_merge_is_told_from_its_beginning_to_its_end(service: RunningService, tmp_path: Path) -> None:
    tensors = {f"layer.{number}": torch.full((64, 64), float(number)) for number in range(8)}
    for seed in (1, 2):
        write_checkpoint(tmp_path / str(seed), fine_tune(tensors, seed, 0.1))
    models = [{"model": str(tmp_path / str(seed))} for seed in (1, 2)]
    seen: list[Job] = []
    with Client(service.url, api_key=service.api_key) as client:
        job = client.submit({"merge_method": "linear", "models": models}, str(tmp_path / "out"))
        done = client.wait(job.id, seen.append, timeout=100)
        events = list(client.events(job.id))
    changes = [event for event in events if event.event != "progress"]
    assert [event.event for event in changes] == [
        *(entry["event"] for entry in done.body["history"][:-1]),
        "succeeded",
    ]
    assert [event.version for event in changes] == list(range(1, done.version + 1))
    assert events[-1].progress == done.progress
    assert [job.progress.bytes_done for job in seen] == sorted(job.progress.bytes_done for job in seen)
    assert seen[-1] == done


def test_a_merge_that_fails_tells_its_webhook(service: RunningService, tmp_path: Path) -> None:
    settings: Settings = service.settings.model_copy(update={"webhook_allow_private": ("127.0.0.1",)})
    with (
        Receiver() as receiver,
        WebhookStore(settings.redis_url, settings.namespace) as store,
        Courier(store, settings),
    ):
        models = [{"model": (tmp_path / name).as_uri()} for name in "ab"]
        options = settings.default_options.model_dump(mode="json")
        record = new_job(
            {"merge_method": "linear", "models": models}, (tmp_path / "out").as_uri(), options, time.time()
        )
        service.jobs.create(record, None, Webhook(receiver.url, ("failed",), SECRET))
        (got,) = receiver.wait_for(1, 60)
        body = Verifier(SECRET).verify(got.body, got.headers)
    assert (body["type"], body["data"]["job"]) == ("merge.failed", record.id)
    assert "no model here" in body["data"]["detail"]
