"""Webhooks within the service: the durable queue on a real Valkey, couriers, and receivers that misbehave."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import pytest
import redis
from standardwebhooks import Webhook as Verifier

from service.jobs.jobstore import JobStore
from service.jobs.record import JobState
from service.settings import Settings
from service.valkey import EmbeddedValkey
from service.webhooks import courier as couriers
from service.webhooks import store as webhookstore
from service.webhooks.courier import Courier
from service.webhooks.posting import Answer, post
from service.webhooks.store import Claim, WebhookStore
from service.webhooks.webhooks import MAX_TRIES, Try
from tests.servers.receiver import Receiver, closes, status
from tests.servers.redis_proxy import AnswerLosingProxy
from tests.service.couriers import FAST, SECRET, cancelled, courier, ended, job, until
from tests.service.job_steps import PATHS, TO_RUNNING, part
from workers.errors import JobNotFoundError

pytestmark = pytest.mark.valkey


@pytest.fixture
def store(valkey_url: str, valkey_namespace: str) -> Iterator[WebhookStore]:
    with WebhookStore(valkey_url, valkey_namespace) as found:
        yield found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(couriers, "POLL_S", 0.01)


def a_try(claim: Claim) -> Try:
    return Try(claim.event.id, claim.number, time.time(), 0.1, 500, "no", None)


class TestQueue:
    def test_what_was_asked_for_is_queued_in_the_step_that_makes_it_so(
        self, job_store: JobStore, store: WebhookStore, raw: redis.Redis
    ) -> None:
        lease = job(job_store, "https://x.test/", "created", "planned", "succeeded", "warning")
        for event in TO_RUNNING:
            job_store.apply(lease.job, event, lease.token)
        job_store.record_part(lease, part(1))
        job_store.warn(lease, "careful")
        for event in PATHS[JobState.SUCCEEDED][3:]:
            job_store.apply(lease.job, event, lease.token)
        found = store.deliveries(lease.job)
        assert (found.url, found.events) == (
            "https://x.test/",
            ("created", "planned", "succeeded", "warning"),
        )
        assert [one.event for one in found.deliveries] == ["created", "planned", "warning", "succeeded"]
        stream: Any = raw.xrange(f"{job_store._namespace}:job:{lease.job}:events")
        told = {fields["event"]: name for name, fields in stream}
        assert [one.id for one in found.deliveries] == [
            f"{lease.job}-{told[d.event]}" for d in found.deliveries
        ]

    def test_in_the_order_of_what_happened_each_to_one(
        self, job_store: JobStore, store: WebhookStore
    ) -> None:
        jobs = [cancelled(job_store, "https://x.test/") for _ in range(40)]
        taken: list[str] = []

        def take(_: int) -> None:
            while (claim := store.claim(60)) is not None:
                taken.append(claim.event.job)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(take, range(8)))
        assert sorted(taken) == sorted(jobs)

    def test_a_claim_runs_out(self, job_store: JobStore, store: WebhookStore) -> None:
        name = cancelled(job_store, "https://x.test/")
        first = store.claim(0.05)
        assert first is not None and first.number == 1
        second = until(lambda: store.claim(60))
        assert (second.event, second.number) == (first.event, 2)
        store.finish(first, a_try(first), "again", 0)  # it was only paused, and does not own it any more
        assert store.claim(60) is None
        store.finish(first, a_try(first), "failed")
        assert store.deliveries(name).deliveries[0].state == "pending"
        store.finish(first, a_try(first), "delivered")  # but what it delivered was delivered
        assert store.deliveries(name).deliveries[0].state == "delivered"
        store.finish(second, a_try(second), "again", 0)
        assert store.claim(60) is None

    def test_what_belongs_to_a_job_that_was_swept_is_dropped(
        self, job_store: JobStore, store: WebhookStore, raw: redis.Redis
    ) -> None:
        gone, other = cancelled(job_store, "https://x.test/"), cancelled(job_store, "https://x.test/")
        key = f"{job_store._namespace}:job:{gone}"
        raw.delete(key, *raw.keys(f"{key}:*"))
        claim = store.claim(60)
        assert claim is not None and claim.event.job == other
        raw.delete(*raw.keys(f"{job_store._namespace}:job:{other}*"))
        store.finish(claim, a_try(claim), "again", 0)
        assert raw.keys(f"{job_store._namespace}:job:*") == []
        assert raw.zcard(f"{job_store._namespace}:webhooks") == 0

    def test_lost_answers_take_and_record_once(self, valkey_server: EmbeddedValkey) -> None:
        namespace, proxy = f"test-{uuid.uuid4().hex}", AnswerLosingProxy("127.0.0.1", valkey_server.port)
        url = valkey_server.url.replace(f":{valkey_server.port}", f":{proxy.port}")
        with closing(proxy), JobStore(url, namespace) as jobs, WebhookStore(url, namespace) as store:
            proxy.lose = 1
            names = {cancelled(jobs, "https://x.test/") for _ in range(2)}
            for _ in range(2):
                proxy.lose = 2
                claim = store.claim(60)
                assert claim is not None and claim.number == 1
                names.remove(claim.event.job)
                proxy.lose = 2
                store.finish(claim, a_try(claim), "again", 60)
                (delivery,) = store.deliveries(claim.event.job).deliveries
                assert (delivery.state, len(delivery.tries)) == ("pending", 1)
                assert 50 < (delivery.next_at or 0) - time.time() < 70
            assert proxy.lost == 9
            assert (names, store.claim(60)) == (set(), None)

    def test_no_such_job(self, store: WebhookStore) -> None:
        for name in ("none", "merge-0" + "0" * 25):
            with pytest.raises(JobNotFoundError):
                store.deliveries(name)

    def test_every_key_is_in_the_table(
        self, job_store: JobStore, store: WebhookStore, raw: redis.Redis
    ) -> None:
        names = [cancelled(job_store, "https://x.test/") for _ in range(2)]
        first = store.claim(60)
        assert first is not None
        store.finish(first, a_try(first), "delivered")
        second = store.claim(60)
        assert second is not None
        documented = (couriers.__doc__ or "") + (webhookstore.__doc__ or "")
        found = {
            key.removeprefix(f"{job_store._namespace}:") for key in raw.keys(f"{job_store._namespace}:*")
        }
        for name in names:
            found = {key.replace(name, "<id>") for key in found}
        found = {key.replace(second.nonce, "<nonce>") for key in found}
        own = {key for key in found if f"``{key}``" in documented} - {"events"}  # a field of another key
        assert len(own) == 5
        assert {key for key in found if "webhook" in key or "deliveries" in key or "tries" in key} == own


class TestDelivery:
    def test_it_is_signed_and_told_once(self, job_store: JobStore, store: WebhookStore) -> None:
        with Receiver() as receiver, courier(store):
            name = cancelled(job_store, receiver.url)
            done = ended(store, name)
            (got,) = receiver.received
        assert (done.event, done.state, done.next_at) == ("cancelled", "delivered", None)
        assert [(t.number, t.status, t.error, t.next_at) for t in done.tries] == [(1, 204, None, None)]
        body = Verifier(SECRET).verify(got.body, got.headers)
        assert (body["type"], body["data"]["job"], body["data"]["state"]) == (
            "merge.cancelled",
            name,
            "cancelled",
        )
        assert got.headers["webhook-id"] == done.id
        assert got.headers["content-type"] == "application/json"

    def test_the_deployments_own_secret(self, job_store: JobStore, store: WebhookStore) -> None:
        own = "whsec_" + "QUJD" * 10
        with Receiver() as receiver:
            name = cancelled(job_store, receiver.url, secret="")
            with courier(store):
                until(lambda: store.deliveries(name).deliveries[0].tries)
            assert receiver.received == []  # it was taken away meanwhile
            with courier(store, secret=own):
                ended(store, name)
            Verifier(own).verify(receiver.received[0].body, receiver.received[0].headers)

    def test_a_receiver_that_fails_is_told_again_with_the_same_id(
        self, job_store: JobStore, store: WebhookStore
    ) -> None:
        with Receiver(status(500), closes, status(302, Location="http://127.0.0.1:1/")) as receiver:
            receiver._behaviours.insert(1, receiver.hangs)
            with courier(store):
                done = ended(store, cancelled(job_store, receiver.url))
            received = receiver.received
        assert [one.path for one in received] == ["/hook"] * 5
        assert {(one.headers["webhook-id"], one.body) for one in received} == {(done.id, received[0].body)}
        for one in received:
            Verifier(SECRET).verify(one.body, one.headers)
        assert [(t.number, t.status) for t in done.tries] == [
            (1, 500),
            (2, None),
            (3, None),
            (4, 302),
            (5, 204),
        ]
        assert all(t.error and t.next_at and t.next_at > t.at for t in done.tries[:-1])
        assert done.state == "delivered"

    def test_it_is_given_up_in_the_end(self, job_store: JobStore, store: WebhookStore) -> None:
        tried = []

        def fail(url: str, *_: Any) -> Answer:
            tried.append(url)
            return Answer(503, "the answer was 503")

        with courier(store, post=fail):
            done = ended(store, cancelled(job_store, "https://x.test/"))
        assert (len(tried), done.state, len(done.tries)) == (MAX_TRIES, "failed", MAX_TRIES)
        assert done.tries[-1].next_at is None

    def test_410_ends_all_of_it(self, job_store: JobStore, store: WebhookStore) -> None:
        with Receiver(status(410)) as receiver, courier(store):
            lease = job(job_store, receiver.url, "created", "planning_started", "planned")
            assert ended(store, lease.job).state == "gone"
            for event in TO_RUNNING[:2]:
                job_store.apply(lease.job, event, lease.token)
            until(lambda: [d.state for d in store.deliveries(lease.job).deliveries] == ["gone"] * 3)
            assert len(receiver.received) == 1

    def test_where_it_may_not_go_nothing_is_sent(self, job_store: JobStore, store: WebhookStore) -> None:
        with Receiver() as receiver:
            name = cancelled(job_store, receiver.url)
            with Courier(store, Settings(), backoff=FAST):
                until(lambda: store.deliveries(name).deliveries[0].tries)
            assert receiver.received == []
        (first, *_) = store.deliveries(name).deliveries[0].tries
        assert "not at a public address" in str(first.error)

    def test_one_that_hangs_does_not_hold_up_the_others(
        self, job_store: JobStore, store: WebhookStore
    ) -> None:
        with Receiver() as slow, Receiver() as quick:
            slow._behaviours = [slow.hangs] * 50
            with courier(store, threads=3, post=partial(post, deadline_s=5)):
                for _ in range(2):
                    cancelled(job_store, slow.url)
                slow.wait_for(2)
                begun = time.monotonic()
                for _ in range(10):
                    cancelled(job_store, quick.url)
                quick.wait_for(10)
                assert time.monotonic() - begun < 4
                slow.released.set()

    def test_closing_waits_for_nobody_that_hangs(
        self, job_store: JobStore, store: WebhookStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(couriers, "CLOSE_S", 0.1)
        with Receiver() as receiver:
            receiver._behaviours = [receiver.hangs]
            with courier(store, threads=1, claim_s=0.2, post=partial(post, deadline_s=30)):
                name = cancelled(job_store, receiver.url)
                receiver.wait_for(1)
                begun = time.monotonic()
            assert time.monotonic() - begun < 5
            with courier(store):
                assert ended(store, name).state == "delivered"

    def test_any_number_of_couriers_deliver_each_once(self, job_store: JobStore, store: WebhookStore) -> None:
        with Receiver() as receiver, courier(store, threads=4), courier(store, threads=4):
            names = [cancelled(job_store, receiver.url) for _ in range(40)]
            for name in names:
                assert ended(store, name).state == "delivered"
            assert len(receiver.received) == 40

    def test_a_defect_of_ours_does_not_end_the_courier(
        self, job_store: JobStore, store: WebhookStore
    ) -> None:
        calls = []

        def broken(*_: Any) -> Answer:
            calls.append(1)
            if len(calls) == 1:
                raise RuntimeError("a defect")
            return Answer(200, None)

        with courier(store, post=broken, threads=1, claim_s=0.1):
            done = ended(store, cancelled(job_store, "https://x.test/"))
        assert (done.state, [t.number for t in done.tries]) == ("delivered", [2])

    def test_the_secret_is_shown_nowhere(
        self, job_store: JobStore, store: WebhookStore, capfd: pytest.CaptureFixture[str]
    ) -> None:
        with Receiver(status(500)) as receiver, courier(store):
            name = cancelled(job_store, receiver.url)
            done = ended(store, name)
        shown = [
            job_store.get(name).model_dump_json(),
            repr(done),
            repr(store.deliveries(name)),
            *capfd.readouterr(),
        ]
        assert all(SECRET[6:] not in text for text in shown)
