"""``Idempotency-Key`` on a real API and Valkey: one key, one job, whatever happens in between."""

from __future__ import annotations

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis

from api.app import create_app
from service.jobs.idempotency import once
from service.jobs.jobstore import JobStore
from service.jobs.transitions import CancelRequested
from service.settings import Settings
from service.valkey import EmbeddedValkey
from tests.api.conftest import serving
from tests.servers.redis_proxy import AnswerLosingProxy
from tests.service.job_steps import fresh
from workers.errors import ConflictError, IdempotencyMismatchError, JobStoreUnavailableError

pytestmark = pytest.mark.valkey

REPLAYED = "idempotent-replayed"
BODY: dict[str, Any] = {
    "recipe": {"merge_method": "linear", "models": [{"model": "/a"}, {"model": "/b"}]},
    "output": "s3://bucket/out",
}
YAML = "merge_method: linear\nmodels:\n- model: /a\n- model: /b\n"


def post(api: httpx.Client, key: str | None, body: dict[str, Any] = BODY, **more: Any) -> httpx.Response:
    return api.post("/v1/merges", json=body, headers={} if key is None else {"Idempotency-Key": key}, **more)


def jobs_of(api: httpx.Client) -> list[str]:
    return [job["id"] for job in api.get("/v1/merges", params={"limit": 200}).json()["jobs"]]


@pytest.fixture
def key() -> str:
    return str(uuid.uuid4())


class TestOneKey:
    def test_the_same_request_is_the_same_job(self, api: httpx.Client, key: str) -> None:
        first = post(api, key)
        backwards = dict(reversed(BODY.items()))
        again = [post(api, key), post(api, f'"{key}"'), post(api, key, backwards)]
        assert (first.status_code, REPLAYED in first.headers) == (202, False)
        for answer in again:
            assert (answer.status_code, answer.headers[REPLAYED]) == (202, "true")
            assert answer.headers["location"] == first.headers["location"]
            assert answer.json() == first.json()
        assert jobs_of(api) == [first.json()["id"]]

    def test_the_job_is_told_as_it_is_now(self, api: httpx.Client, job_store: JobStore, key: str) -> None:
        job = post(api, key).json()["id"]
        job_store.apply(job, CancelRequested())
        assert post(api, key).json()["state"] == "cancelled"

    def test_another_request_is_refused(self, api: httpx.Client, key: str) -> None:
        post(api, key)
        for answer in (
            post(api, key, {**BODY, "output": "s3://bucket/other"}),
            post(api, key, {**BODY, "options": {}}),
            api.post(
                "/v1/merges",
                params={"output": "s3://bucket/out"},
                content=YAML,
                headers={"content-type": "application/yaml", "idempotency-key": key},
            ),
        ):
            assert answer.status_code == 422
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["type"] == "urn:mergemill:error:idempotency_mismatch"
            assert key not in answer.text
        assert len(jobs_of(api)) == 1

    def test_without_a_key_every_request_is_a_job(self, api: httpx.Client) -> None:
        assert len({post(api, None).json()["id"] for _ in range(2)}) == 2

    def test_yaml_is_compared_as_a_recipe(self, api: httpx.Client, key: str) -> None:
        def ask(text: str, **query: str) -> httpx.Response:
            headers = {"content-type": "application/yaml", "idempotency-key": key}
            return api.post(
                "/v1/merges", params={"output": "s3://b/o", **query}, content=text, headers=headers
            )

        first = ask(YAML)
        assert ask(f"# a comment\n{YAML}").json()["id"] == first.json()["id"]
        assert ask(YAML, overwrite="true").status_code == 422
        assert ask(f"{YAML}seed: 5\n").status_code == 422

    def test_a_refused_request_stores_nothing(
        self, api: httpx.Client, raw: redis.Redis, valkey_namespace: str, key: str
    ) -> None:
        wrong = {**BODY, "recipe": {"merge_method": "nearly"}}
        assert post(api, key, wrong).status_code == 422
        assert not [key for key in raw.keys(f"{valkey_namespace}:*") if ":key" not in key]
        assert REPLAYED not in post(api, key).headers

    @pytest.mark.parametrize("value", ["", "a b", "x" * 256, "é".encode()])
    def test_what_can_be_no_key_is_refused(self, api: httpx.Client, value: str | bytes) -> None:
        answer = api.post("/v1/merges", json=BODY, headers=[(b"idempotency-key", value)])  # type: ignore[list-item]
        assert (answer.status_code, answer.json()["type"]) == (400, "urn:mergemill:error:idempotency_key")
        assert jobs_of(api) == []

    def test_two_headers_are_one_too_many(self, api: httpx.Client, key: str) -> None:
        headers = [("idempotency-key", key), ("idempotency-key", key)]
        assert api.post("/v1/merges", json=BODY, headers=headers).status_code == 400

    def test_twenty_at_the_same_instant_make_one_job(self, api: httpx.Client) -> None:
        gate = threading.Barrier(20)

        def ask(key: str) -> httpx.Response:
            gate.wait(30)
            return post(api, key)

        with ThreadPoolExecutor(20) as pool:
            for _ in range(5):
                key = str(uuid.uuid4())
                answers = list(pool.map(ask, [key] * 20))
                assert {answer.status_code for answer in answers} == {202}
                assert len({answer.json()["id"] for answer in answers}) == 1
                assert len({answer.headers["location"] for answer in answers}) == 1
                assert sum(REPLAYED not in answer.headers for answer in answers) == 1
        assert len(jobs_of(api)) == 5

    def test_an_api_that_is_started_again_knows_it(
        self, valkey_url: str, valkey_namespace: str, key: str
    ) -> None:
        settings = Settings(redis_url=valkey_url, namespace=valkey_namespace, auth="off")
        with serving(create_app(settings)) as before:
            first = post(before, key)
        with serving(create_app(settings)) as after:
            assert post(after, key).headers["location"] == first.headers["location"]
            assert post(after, key, {**BODY, "output": "/o"}).status_code == 422

    @pytest.mark.parametrize("made", [False, True])
    def test_an_api_that_dies_before_it_answered(
        self, api: httpx.Client, monkeypatch: pytest.MonkeyPatch, key: str, made: bool
    ) -> None:
        create = JobStore.create

        def dying(*arguments: Any) -> str:
            if made:
                create(*arguments)
            raise JobStoreUnavailableError("the end")

        with monkeypatch.context() as patch:
            patch.setattr(JobStore, "create", dying)
            assert post(api, key).status_code == 503
        before = jobs_of(api)
        again = post(api, key)
        assert (len(before), REPLAYED in again.headers) == ((1, True) if made else (0, False))
        assert jobs_of(api) == [again.json()["id"]]

    def test_it_is_forgotten_in_the_end(
        self, valkey_url: str, valkey_namespace: str, raw: redis.Redis, key: str
    ) -> None:
        settings = Settings(
            redis_url=valkey_url, namespace=valkey_namespace, auth="off", idempotency_seconds=0.2
        )
        with serving(create_app(settings)) as api:
            first = post(api, key)
            (remembered,) = raw.keys(f"{valkey_namespace}:once:*")
            assert 0 < raw.pttl(remembered) <= 200
            deadline = time.monotonic() + 10
            while raw.exists(remembered):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert post(api, key).json()["id"] != first.json()["id"]

    def test_a_lost_answer_of_redis_makes_no_second_job(
        self, valkey_server: EmbeddedValkey, key: str
    ) -> None:
        namespace = f"test-{uuid.uuid4().hex}"
        proxy = AnswerLosingProxy("127.0.0.1", valkey_server.port)
        url = valkey_server.url.replace(f":{valkey_server.port}", f":{proxy.port}")
        try:
            with serving(create_app(Settings(redis_url=url, namespace=namespace, auth="off"))) as api:
                proxy.lose = 3
                first = post(api, key)
                assert (first.status_code, proxy.lost, REPLAYED in first.headers) == (202, 3, False)
                proxy.lose = 1
                assert post(api, key).headers[REPLAYED] == "true"
                assert jobs_of(api) == [first.json()["id"]]
        finally:
            proxy.close()


class TestTheStore:
    def test_a_job_and_its_key_are_one_step(self, job_store: JobStore, raw: redis.Redis) -> None:
        asked = once("key", "POST", "/", [], {}, 60)
        other = once("key", "POST", "/", [], {"other": 1}, 60)
        first, second = fresh(time.time()), fresh(time.time())
        assert job_store.create(first, asked) == first.id
        assert job_store.create(second, asked) == first.id
        with pytest.raises(IdempotencyMismatchError):
            job_store.create(second, other)
        with pytest.raises(ConflictError):
            job_store.create(first, asked)
        assert [job.id for job in job_store.list(10).records] == [first.id]

    def test_a_key_whose_job_is_gone_binds_nobody(self, job_store: JobStore, raw: redis.Redis) -> None:
        asked = once("key", "POST", "/", [], {}, 60)
        first, second = fresh(time.time()), fresh(time.time())
        job_store.create(first, asked)
        raw.delete(f"{job_store._namespace}:job:{first.id}")
        assert job_store.create(second, asked) == second.id
        assert job_store.create(first, asked) == second.id
