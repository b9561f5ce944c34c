"""``/readyz`` tells which dependency is missing; ``/healthz`` and ``/metrics`` beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from api.app import create_app
from api.readiness import StoreProbe, compute_check, missing
from api.schemas import Check
from service.jobs.jobstore import JobStore
from service.jobs.record import new_job
from service.settings import Settings
from service.watching.deployment import Deployment, Heartbeat, Scheduler, View
from tests.api.conftest import serving
from workers.errors import AccessDeniedError, ObjectNotFoundError
from workers.store.base import ObjectInfo

BEAT = Heartbeat(owner="me", version="1", nodes=2, cpus=8, gpus=0, jobs=0, ttl_s=30)


class Listed:
    """A store that lists, when it is let to."""

    def __init__(self, answer: Callable[[], Iterator[ObjectInfo]] = lambda: iter(())) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def list(self, prefix: str, *, beside: bool = False) -> Iterator[ObjectInfo]:
        assert beside
        self.asked.append(prefix)
        return self.answer()


def probe(store: Listed, clock: Callable[[], float] = time.monotonic, **options: float) -> StoreProbe:
    roots = {"org/": "s3://models/org/", "": "s3://models/org/"}
    return StoreProbe(store, roots, clock=clock, **options)  # type: ignore[arg-type]


class TestStoreProbe:
    pytestmark = pytest.mark.fast

    def test_the_store_is_asked_again_when_its_answer_is_old(self) -> None:
        now = [100.0]
        store = Listed()
        with probe(store, lambda: now[0]) as asking:
            assert asking.check() == Check(state="ok", age_seconds=0.0)
            now[0] += 14
            assert asking.check() == Check(state="ok", age_seconds=14.0)
            assert store.asked == ["s3://models/org/"]
            now[0] += 1
            assert asking.check() == Check(state="ok", age_seconds=0.0)
            assert len(store.asked) == 2

    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (AccessDeniedError("s3://models/org"), "AccessDenied"),
            (ObjectNotFoundError("s3://models"), "no such bucket"),
        ],
    )
    def test_what_is_wrong_is_told_without_a_name(self, error: Exception, told: str) -> None:
        def fail() -> Iterator[ObjectInfo]:
            raise error
            yield

        with probe(Listed(fail)) as asking:
            found = asking.check()
        assert found.state == "missing"
        assert told in str(found.detail)
        assert "s3:" not in str(found.detail)
        assert "models/" not in str(found.detail)

    def test_a_store_that_hangs_holds_up_nobody(self) -> None:
        go_on = threading.Event()

        def hang() -> Iterator[ObjectInfo]:
            go_on.wait(60)
            yield from ()

        now = [0.0]
        store = Listed()
        with probe(store, lambda: now[0], patience_s=0.05) as asking:
            try:
                assert asking.check().state == "ok"
                store.answer = hang
                now[0] = 20
                assert asking.check() == Check(state="ok", age_seconds=20.0)  # it may still answer
                now[0] = 31
                assert asking.check() == Check(state="missing", detail="no answer for 11 s")
                assert len(store.asked) == 2
            finally:
                go_on.set()

    def test_directories(self, tmp_path: Path) -> None:
        with StoreProbe(Listed(), {"": tmp_path.as_uri()}) as there:  # type: ignore[arg-type]
            assert there.check().state == "ok"
        with StoreProbe(Listed(), {"": f"{tmp_path.as_uri()}/x"}) as gone:  # type: ignore[arg-type]
            assert gone.check() == gone.check().model_copy(update={"state": "missing"})
            assert "no such directory" in str(gone.check().detail)

    def test_no_roots(self) -> None:
        with StoreProbe(Listed(), {}) as asking:  # type: ignore[arg-type]
            assert asking.check().state == "unused"


@pytest.mark.fast
class TestCompute:
    def view(self, *beats: Heartbeat) -> View:
        return View({}, None, tuple(Scheduler(beat, age_s=1.0) for beat in beats))

    def test_nobody(self) -> None:
        assert compute_check(self.view()).state == "missing"

    def test_a_scheduler_without_a_cluster(self) -> None:
        idle = Heartbeat(owner="idle", version="1", nodes=0, cpus=0, gpus=0, jobs=0, ttl_s=30)
        assert compute_check(self.view(idle)).state == "missing"
        assert compute_check(self.view(idle, BEAT)).state == "ok"
        assert "2 scheduler(s); 2 node(s), 8 CPUs, 0 GPUs" in str(compute_check(self.view(BEAT, idle)).detail)

    def test_only_what_the_api_itself_needs_is_missing(self) -> None:
        gone, there = Check(state="missing", detail="why"), Check(state="ok")
        assert missing({"redis": there, "store": there, "compute": gone}) == {}
        assert missing({"redis": gone, "store": there, "compute": there}) == {"redis": "why"}
        assert missing({"redis": there, "store": gone, "compute": there}) == {"store": "why"}
        assert missing({"redis": there, "store": Check(state="unknown"), "compute": there}) == {}


@pytest.mark.valkey
class TestRoutes:
    def test_without_compute_it_is_ready_and_says_so(self, api: httpx.Client) -> None:
        answer = api.get("/readyz")
        assert answer.status_code == 200
        found = answer.json()
        assert (found["status"], found["missing"]) == ("ready", {})
        assert {name: check["state"] for name, check in found["checks"].items()} == {
            "redis": "ok", "store": "unused", "compute": "missing"
        }  # fmt: skip
        assert found["warnings"] == ["compute: no scheduler is alive: jobs wait until one is"]

    def test_with_all(
        self, valkey_url: str, valkey_namespace: str, tmp_path: Path, job_store: JobStore
    ) -> None:
        with Deployment(valkey_url, valkey_namespace) as deployment:
            deployment.beat(BEAT)
        settings = Settings(
            redis_url=valkey_url, namespace=valkey_namespace, model_roots={"": tmp_path.as_uri()}
        )
        with serving(create_app(settings)) as client:
            found = client.get("/readyz").json()
            assert {check["state"] for check in found["checks"].values()} == {"ok"}
            assert found["warnings"] == []
            assert 0 <= found["checks"]["compute"]["age_seconds"] < 30

    def test_a_store_that_is_gone(self, valkey_url: str, valkey_namespace: str, tmp_path: Path) -> None:
        settings = Settings(
            redis_url=valkey_url, namespace=valkey_namespace, model_roots={"": f"{tmp_path.as_uri()}/gone"}
        )
        with serving(create_app(settings)) as client:
            answer = client.get("/readyz")
        assert answer.status_code == 503
        assert answer.headers["retry-after"]
        assert set(answer.json()["missing"]) == {"store"}
        assert answer.json()["type"] == "urn:mergemill:error:store_unavailable"
        assert answer.json()["checks"]["redis"]["state"] == "ok"
        assert str(tmp_path) not in answer.text


def samples(client: httpx.Client, **headers: str) -> dict[str, dict[tuple[Any, ...], float]]:
    answer = client.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, dict[tuple[Any, ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


@pytest.mark.valkey
class TestMetrics:
    def test_the_queue_and_the_requests(
        self, api: httpx.Client, job_store: JobStore, valkey_url: str, valkey_namespace: str
    ) -> None:
        job_store.create(new_job({}, "s3://b/o", {}, time.time() - 500))
        with Deployment(valkey_url, valkey_namespace) as deployment:
            deployment.beat(BEAT)
        before = samples(api)
        assert before["mergemill_jobs"][("queued",)] == 1
        assert sum(before["mergemill_jobs"].values()) == 1
        assert 500 <= before["mergemill_queue_age_seconds"][()] < 600
        assert before["mergemill_schedulers"] == {(): 1}
        assert before["mergemill_job_store_up"] == {(): 1}
        for job in ("merge-" + "0" * 26, "nonsense", "x" * 300):
            assert api.get(f"/v1/merges/{job}").status_code == 404
        assert api.get("/no/such/thing").status_code == 404
        assert api.request("BREW", "/v1/methods").status_code == 405
        requests = samples(api)["mergemill_http_requests_total"]

        def more(*labels: str) -> float:
            return requests[labels] - before.get("mergemill_http_requests_total", {}).get(labels, 0)

        assert more("GET", "/v1/merges/{job}", "404") == 3
        assert more("GET", "other", "404") == 1
        assert more("other", "/v1/methods", "405") + requests.get(("other", "other", "405"), 0) == 1
        assert not any("nonsense" in label for labels in requests for label in labels)

    def test_no_redis_is_one_metric(self, lonely_api: httpx.Client) -> None:
        found = samples(lonely_api)
        assert found["mergemill_job_store_up"] == {(): 0}
        assert "mergemill_jobs" not in found
        assert "mergemill_build_info" in found

    def test_they_are_for_this_machine_or_whoever_has_the_token(
        self, api: httpx.Client, valkey_url: str, valkey_namespace: str
    ) -> None:
        assert api.get("/metrics", headers={"X-Forwarded-For": "10.0.0.1"}).status_code == 403
        assert api.get("/metrics", headers={"Forwarded": "for=10.0.0.1"}).json()["status"] == 403
        settings = Settings(redis_url=valkey_url, namespace=valkey_namespace, metrics_token="a secret")
        with serving(create_app(settings)) as client:
            assert client.get("/metrics").status_code == 403
            assert samples(client, authorization="Bearer a secret", forwarded="for=10.0.0.1")
