"""Routes on a real Valkey: what they read, when they refuse, and that nothing slow holds up the rest."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from api import looking
from api.app import PLAN_THREADS, create_app
from api.looking import plan_wanted
from api.routes import plans
from mergemill import Client
from service.jobs.jobstore import JobStore
from service.jobs.record import JobRecord
from service.jobs.transitions import CommitStarted, Event, Succeeded
from service.planning.checkpoint import INDEX_FILE
from service.settings import Settings
from tests.api.conftest import serving
from tests.checkpoints import fine_tune, write_checkpoint
from tests.service.job_steps import ALL_COMPLETE, TO_RUNNING, fresh, part
from workers.errors import JobStoreUnavailableError, OutputReplacedError, StoreUnavailableError
from workers.store import Stores
from workers.store.base import ObjectInfo

pytestmark = pytest.mark.valkey

PROBLEM = "application/problem+json"
RECIPE = {"merge_method": "linear", "models": [{"model": "/a"}, {"model": "/b"}]}


def record(store: JobStore, *events: Event, output: str = "s3://bucket/output") -> JobRecord:
    """A job that the events have happened to; parts are recorded once it runs."""
    job = fresh(time.time()).model_copy(update={"output": output})
    store.create(job)
    lease = store.acquire(job.id, "owner", 60)
    assert lease is not None
    for event in events:
        if isinstance(event, CommitStarted):
            store.record_part(lease, part(1))
        job = store.apply(job.id, event, lease.token)
    return job


@pytest.fixture
def merged(job_store: JobStore, tmp_path: Path) -> JobRecord:
    """A job that has merged one file into a directory."""
    (tmp_path / "config.json").write_bytes(b"0123456789")
    files = [{"name": "config.json", "size": 10, "digest": "sha256:x"}]
    events = (*TO_RUNNING, CommitStarted(), *ALL_COMPLETE, Succeeded({"files": files}))
    return record(job_store, *events, output=tmp_path.as_uri())


class TestMerges:
    def test_what_was_accepted_is_answered_without_another_read(
        self, api: httpx.Client, job_store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> None:
            raise JobStoreUnavailableError("gone since")

        with monkeypatch.context() as patch:
            for name in ("status", "get"):
                patch.setattr(JobStore, name, broken)
            answer = api.post("/v1/merges", json={"recipe": RECIPE, "output": "/o"})
        assert answer.status_code == 202
        assert answer.headers["location"] == answer.json()["links"]["self"]
        assert api.get(answer.headers["location"]).json() == answer.json()
        assert job_store.get(answer.json()["id"]).output == "file:///o"

    def test_yaml_with_options_in_the_query(self, api: httpx.Client, job_store: JobStore) -> None:
        text = "merge_method: linear\nmodels:\n- model: /a\n- model: /b\n"
        query = {"output": "s3://bucket/out/", "overwrite": "true", "part_bytes": str(16 << 20)}
        answer = api.post(
            "/v1/merges", params=query, content=text, headers={"content-type": "text/yaml; charset=utf-8"}
        )
        assert answer.status_code == 202, answer.text
        stored = job_store.get(answer.json()["id"])
        assert stored.output == "s3://bucket/out"
        assert stored.recipe == RECIPE
        assert (stored.options["overwrite"], stored.options["part_bytes"]) == (True, 16 << 20)

    def test_an_output_that_is_taken_is_refused(
        self, api: httpx.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At once, where the store says so soon; the job finds out by itself where it does not."""
        (tmp_path / "model.safetensors").touch()
        body = {"recipe": RECIPE, "output": str(tmp_path)}
        answer = api.post("/v1/merges", json=body)
        assert (answer.status_code, answer.json()["type"]) == (422, "urn:mergemill:error:plan")
        (said,) = answer.json()["errors"]
        for way in ("--overwrite", "?overwrite=true", '"options": {"overwrite": true}'):
            assert way in said
        assert api.post("/v1/merges", json=body | {"options": {"overwrite": True}}).status_code == 202

        def away(*_: Any) -> None:
            raise StoreUnavailableError("away")

        answered = threading.Event()
        monkeypatch.setattr(looking, "LOOK_S", 0.05)
        for broken in (away, lambda *_: answered.wait(30)):
            monkeypatch.setattr(looking, "holds_checkpoint", broken)
            assert api.post("/v1/merges", json=body).status_code == 202
        answered.set()

    def test_a_page_is_one_read_and_tells_the_progress(
        self, api: httpx.Client, job_store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        jobs = [record(job_store, *TO_RUNNING), record(job_store, *TO_RUNNING, CommitStarted())]
        alone = [api.get(f"/v1/merges/{job.id}").json() for job in reversed(jobs)]
        assert alone[0]["progress"]["bytes_done"] == 1000
        monkeypatch.setattr(JobStore, "status", None)
        assert api.get("/v1/merges").json()["jobs"] == alone
        assert api.get("/v1/merges", params={"state": "running"}).json()["jobs"] == alone[1:]

    @pytest.mark.parametrize("cursor", ["garbage", "", "%00", "é", "bWVyZ2U"])
    def test_a_cursor_of_somebody_elses(self, api: httpx.Client, cursor: str) -> None:
        answer = api.get("/v1/merges", params={"cursor": cursor})
        assert answer.status_code == 400
        assert answer.headers["content-type"] == PROBLEM
        assert (answer.json()["title"], answer.json()["type"]) == (
            "No such page",
            "urn:mergemill:error:cursor",
        )

    def test_files_before_there_are_any(self, api: httpx.Client, job_store: JobStore) -> None:
        job = record(job_store, *TO_RUNNING)
        for path in ("files", "files/config.json"):
            answer = api.get(f"/v1/merges/{job.id}/{path}")
            assert answer.status_code == 409
            assert answer.json()["title"] == "The job has no files yet"
            assert answer.json()["type"] == "urn:mergemill:error:not_ready"
            assert "running" in answer.json()["detail"]


class TestReplacedOutputs:
    """Two jobs, one output: what the first wrote is handed out for as long as it is there."""

    def merged(self, job_store: JobStore, place: Path, text: str) -> JobRecord:
        """A job that has just written its files there."""
        files = {"mergemill.json": f"manifest of {text}", "model.bin": text, INDEX_FILE: "{}"}
        listing = []
        for name, content in files.items():
            (place / name).write_text(content)
            digest = f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
            listing.append({"name": name, "size": len(content), "digest": digest})
        events = (*TO_RUNNING, CommitStarted(), *ALL_COMPLETE, Succeeded({"files": listing}))
        return record(job_store, *events, output=place.as_uri())

    def test_the_old_job_names_the_new_one(
        self, api: httpx.Client, job_store: JobStore, tmp_path: Path
    ) -> None:
        old = self.merged(job_store, tmp_path, "one")
        assert api.get(f"/v1/merges/{old.id}/files/model.bin").text == "one"
        new = self.merged(job_store, tmp_path, "two")  # of the same size
        for path in ("files", "files/model.bin", f"files/{INDEX_FILE}"):
            answer = api.get(f"/v1/merges/{old.id}/{path}")
            assert answer.status_code == 410
            assert answer.json()["type"] == "urn:mergemill:error:output_replaced"
            assert f"replaced since by {new.id}" in answer.json()["detail"]
            assert api.get(f"/v1/merges/{new.id}/{path}").status_code == 200
        with (
            Client(str(api.base_url), api_key=api.headers["Authorization"].split()[1]) as client,
            pytest.raises(OutputReplacedError, match=f"replaced since by {new.id}"),
        ):
            client.download(old.id, tmp_path / "down")
        assert not (tmp_path / "down").exists()

    def test_the_same_files_again_are_the_same(
        self, api: httpx.Client, job_store: JobStore, tmp_path: Path
    ) -> None:
        old, new = (self.merged(job_store, tmp_path, "one") for _ in range(2))
        for job in (old, new):
            assert api.get(f"/v1/merges/{job.id}/files/model.bin").text == "one"

    @pytest.mark.parametrize("name", ["mergemill.json", INDEX_FILE])
    def test_while_it_is_replaced_and_when_it_is_gone(
        self, api: httpx.Client, job_store: JobStore, tmp_path: Path, name: str
    ) -> None:
        job = self.merged(job_store, tmp_path, "one")
        (tmp_path / name).unlink()
        answer = api.get(f"/v1/merges/{job.id}/files/model.bin")
        assert answer.status_code == 410
        assert "is being replaced or was deleted" in answer.json()["detail"]

    def test_a_file_of_another_length(self, api: httpx.Client, job_store: JobStore, tmp_path: Path) -> None:
        job = self.merged(job_store, tmp_path, "one")
        (tmp_path / "model.bin").write_text("longer")
        answer = api.get(f"/v1/merges/{job.id}/files/model.bin")
        assert answer.status_code == 410
        assert "has 6 bytes" in answer.json()["detail"]


class TestHead:
    def test_head_is_get_without_the_body(self, api: httpx.Client, merged: JobRecord) -> None:
        here = f"/v1/merges/{merged.id}"
        paths = ["/v1/merges", here, f"{here}/files", f"{here}/files/config.json", "/v1/methods"]
        for path in [*paths, "/healthz", "/readyz", "/v1/healthz", "/v1/readyz"]:
            got, head = api.get(path), api.head(path)
            assert (got.status_code, head.status_code, head.content) == (200, 200, b""), path
            assert head.headers["content-length"] == str(len(got.content))
            assert head.headers["content-type"] == got.headers["content-type"]
        assert api.head("/v1/merges/none").status_code == 404
        assert api.head("/v1/plans").status_code == 405

    def test_ranges_still_work(self, api: httpx.Client, merged: JobRecord) -> None:
        path = f"/v1/merges/{merged.id}/files/config.json"
        answer = api.get(path, headers={"range": "bytes=2-4"})
        assert (answer.status_code, answer.content) == (206, b"234")
        assert api.head(path).headers["accept-ranges"] == "bytes"

    def test_a_presigned_url_is_not_for_head(
        self, api: httpx.Client, job_store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = [{"name": "config.json", "size": 12, "digest": "sha256:x"}]
        events = (*TO_RUNNING, CommitStarted(), *ALL_COMPLETE, Succeeded({"files": files}))
        path = f"/v1/merges/{record(job_store, *events).id}/files/config.json"
        monkeypatch.setattr(Stores, "head", lambda _, uri: ObjectInfo(uri, 12, "etag"))
        monkeypatch.setattr(Stores, "presign", lambda _, uri, __: f"http://elsewhere/{uri[5:]}")
        answer = api.head(path)
        assert (answer.status_code, answer.headers["content-length"]) == (200, "12")
        answer = api.get(path)
        assert (answer.status_code, answer.headers["location"]) == (
            307,
            "http://elsewhere/bucket/output/config.json",
        )


class TestPlans:
    @pytest.fixture
    def body(self, tmp_path: Path) -> dict[str, Any]:
        """A plan that works, into a place with nothing there."""
        tensors = {"a": torch.arange(8, dtype=torch.float32)}
        for seed in (1, 2):
            write_checkpoint(tmp_path / str(seed), fine_tune(tensors, seed, 0.1))
        models = [{"model": str(tmp_path / str(seed))} for seed in (1, 2)]
        return {"recipe": {"merge_method": "linear", "models": models}, "output": str(tmp_path / "out")}

    def test_a_plan(self, api: httpx.Client, body: dict[str, Any]) -> None:
        answer = api.post("/v1/plans", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["price"]["bytes_written"] == answer.json()["shards"][0]["size"]
        assert answer.json()["total_size"] == 32

    @pytest.mark.parametrize(
        "name", ["model.safetensors", "model.safetensors.index.json", "model-1.safetensors"]
    )
    def test_what_is_at_the_output(
        self, api: httpx.Client, body: dict[str, Any], tmp_path: Path, name: str
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).touch()
        answer = api.post("/v1/plans", json=body)
        assert answer.status_code == 422
        (said,) = answer.json()["errors"]
        assert name in said and "overwrite" in said
        assert api.post("/v1/plans", json=body | {"options": {"overwrite": True}}).status_code == 200
        body["recipe"]["models"].append({"model": str(tmp_path / "none")})
        assert len(api.post("/v1/plans", json=body).json()["errors"]) == 2
        assert api.post("/v1/plans", json={"recipe": RECIPE}).status_code == 422

    def test_slow_plans_hold_up_nothing_else(
        self, api: httpx.Client, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        inside, go_on = threading.Semaphore(0), threading.Event()
        planning = plan_wanted

        def slow(*arguments: Any) -> Any:
            inside.release()
            assert go_on.wait(60)
            return planning(*arguments)

        monkeypatch.setattr(plans, "plan_wanted", slow)
        with ThreadPoolExecutor(60) as pool:
            try:
                asked = [pool.submit(api.post, "/v1/plans", json=body) for _ in range(60)]
                for _ in range(PLAN_THREADS):
                    assert inside.acquire(timeout=30)
                for path in ("/healthz", "/readyz", "/v1/merges"):
                    assert api.get(path, timeout=10).status_code == 200
                assert not inside.acquire(blocking=False)
            finally:
                go_on.set()
            assert {answer.result().status_code for answer in asked} == {200}


class TestHealth:
    def test_no_redis(self, lonely_api: httpx.Client) -> None:
        answer = lonely_api.get("/readyz")
        assert answer.status_code == 503
        assert answer.headers["content-type"] == PROBLEM
        assert answer.headers["retry-after"]
        assert "Connection" in answer.json()["missing"]["redis"]
        assert answer.json()["type"] == "urn:mergemill:error:job_store_unavailable"
        assert answer.json()["checks"]["redis"]["state"] == "missing"
        assert answer.json()["checks"]["compute"]["state"] == "unknown"
        assert answer.json()["status"] == 503
        assert lonely_api.get("/healthz").json() == {"status": "ok"}
        assert lonely_api.get("/v1/merges").status_code == 503


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was closed so far."""
    found: list[str] = []

    def watch(kind: type[Stores | JobStore]) -> None:
        close = kind.close

        def closing(self: Any) -> None:
            found.append(kind.__name__)
            close(self)

        monkeypatch.setattr(kind, "close", closing)

    watch(Stores)
    watch(JobStore)
    return found


def test_connections_are_closed_at_the_end(valkey_url: str, valkey_namespace: str, closed: list[str]) -> None:
    with serving(create_app(Settings(redis_url=valkey_url, namespace=valkey_namespace))) as client:
        assert client.get("/readyz").is_success
        assert closed == []
    assert closed == ["JobStore", "Stores"]
