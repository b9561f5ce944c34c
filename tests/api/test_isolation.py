"""Two keys that may not see or touch what is the other's, by any route; and where each may read and write."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from api.app import create_app
from service.jobs.jobstore import JobStore
from service.jobs.record import JobRecord, JobState
from service.jobs.transitions import CommitStarted, Succeeded
from service.keys import Access, split_token
from service.planning.checkpoint import INDEX_FILE
from service.settings import Settings
from tests.api.conftest import serving
from tests.checkpoints import fine_tune, write_checkpoint
from tests.servers.keys import bearer, make_key
from tests.service.job_steps import ALL_COMPLETE, TO_RUNNING, fresh, part
from workers.task import JSONValue

pytestmark = pytest.mark.valkey

FORBIDDEN = "urn:mergemill:error:forbidden"
NOWHERE = "merge-0" + "0" * 25


class Tenants:
    """An API, two keys with a directory each, an admin's, and a job of each in two states."""

    def __init__(self, url: str, namespace: str, http: httpx.Client, place: Path) -> None:
        self.http = http
        self.place = place
        self.store = JobStore(url, namespace)
        self.token: dict[str, str] = {"root": make_key(url, namespace)}
        self.jobs: dict[str, list[JobRecord]] = {}
        for name in ("ann", "bob"):
            home = place / name
            write_checkpoint(home / "a", fine_tune({"w": torch.arange(8.0)}, 1, 0.1))
            write_checkpoint(home / "b", fine_tune({"w": torch.arange(8.0)}, 2, 0.1))
            (home / "merged").mkdir()
            (home / "merged/config.json").write_text(f"{name}'s secret")
            self.token[name] = make_key(url, namespace, ["read", "submit"], [home.as_uri()], [home.as_uri()])
            self.jobs[name] = [self._job(name), self.done(name)]

    def key(self, name: str) -> str:
        return (split_token(self.token[name]) or ("", ""))[0]

    def ask(self, name: str, method: str, path: str, **more: Any) -> httpx.Response:
        return self.http.request(method, path, headers=bearer(self.token[name]), **more)

    def status(self, name: str, method: str, path: str) -> int:
        """What is answered, without waiting for all of it: a stream of events does not end."""
        with self.http.stream(method, path, headers=bearer(self.token[name])) as answer:
            return answer.status_code

    def _job(self, name: str, output: str | None = None) -> JobRecord:
        home = (self.place / name).as_uri()
        place = output or f"{home}/merged"
        access = Access(inputs=(home,), outputs=(home, place))
        job = fresh(time.time()).model_copy(update={"key": self.key(name), "access": access, "output": place})
        self.store.create(job)
        return job

    def done(self, name: str, output: str | None = None, files: list[JSONValue] | None = None) -> JobRecord:
        job = self._job(name, output)
        lease = self.store.acquire(job.id, "owner", 60)
        assert lease is not None
        files = files or [{"name": "config.json", "size": 12, "digest": "sha256:x"}]
        for event in (*TO_RUNNING, CommitStarted(), *ALL_COMPLETE, Succeeded({"files": files})):
            if isinstance(event, CommitStarted):
                self.store.record_part(lease, part(1))
            job = self.store.apply(job.id, event, lease.token)
        return job


@pytest.fixture
def tenants(valkey_url: str, valkey_namespace: str, tmp_path: Path) -> Iterator[Tenants]:
    settings = Settings(
        redis_url=valkey_url, namespace=valkey_namespace, model_roots={"hub/": str(tmp_path / "hub")}
    )
    with serving(create_app(settings)) as client:
        made = Tenants(valkey_url, valkey_namespace, client, tmp_path)
        with made.store:
            yield made


def job_routes(api: httpx.Client) -> list[tuple[str, str]]:
    """Every operation of the document that is about one job."""
    paths = api.get("/openapi.json").json()["paths"]
    found = [
        (method.upper(), path) for path, methods in paths.items() for method in methods if "{job}" in path
    ]
    assert {path for _, path in found} >= {
        "/v1/merges/{job}",
        "/v1/merges/{job}/cancel",
        "/v1/merges/{job}/events",
        "/v1/merges/{job}/deliveries",
        "/v1/merges/{job}/files/{name}",
    }
    return [*found, *(("HEAD", path) for method, path in found if method == "GET")]


def test_nobody_sees_or_touches_a_job_of_anothers_by_any_route(tenants: Tenants) -> None:
    for method, template in job_routes(tenants.http):
        for job in tenants.jobs["ann"]:
            path = template.replace("{job}", job.id).replace("{name}", "config.json")
            theirs = tenants.ask("bob", method, path)
            missing = tenants.ask("bob", method, path.replace(job.id, NOWHERE))
            assert theirs.status_code == missing.status_code == 404, (method, path, theirs.text)
            if method != "HEAD":
                assert theirs.json()["type"] == "urn:mergemill:error:job_not_found"
                told, never = ({**answer.json(), "request_id": ""} for answer in (theirs, missing))
                told["detail"] = told["detail"].replace(job.id, NOWHERE)
                assert told == never  # the refusal does not tell either
            if method == "DELETE":  # once is enough
                continue
            own = [tenants.status(name, method, path) for name in ("ann", "root")]
            assert 404 not in own, (method, path)
    assert [tenants.store.get(job.id) for job in tenants.jobs["bob"]] == tenants.jobs["bob"]


def test_a_cancel_of_anothers_does_nothing(tenants: Tenants) -> None:
    job = tenants.jobs["ann"][0]
    assert tenants.ask("bob", "POST", f"/v1/merges/{job.id}/cancel").status_code == 404
    assert tenants.store.get(job.id) == job
    assert tenants.ask("root", "POST", f"/v1/merges/{job.id}/cancel").status_code == 202
    assert tenants.store.get(job.id).state == JobState.CANCELLED


def test_lists_are_of_ones_own(tenants: Tenants) -> None:
    listed: dict[str, list[str]] = {}
    for name in ("ann", "bob", "root"):
        found: list[str] = []
        cursor = None
        while True:
            page = tenants.ask(
                name, "GET", "/v1/merges", params={"limit": 1} | ({"cursor": cursor} if cursor else {})
            )
            found += [job["id"] for job in page.json()["jobs"]]
            cursor = page.json()["next_cursor"]
            if cursor is None:
                break
        listed[name] = found
    expected = {name: {job.id for job in jobs} for name, jobs in tenants.jobs.items()}
    assert {name: set(found) for name, found in listed.items()} == {
        **expected,
        "root": expected["ann"] | expected["bob"],
    }
    done = tenants.ask("bob", "GET", "/v1/merges", params={"state": "succeeded"}).json()["jobs"]
    assert [job["id"] for job in done] == [tenants.jobs["bob"][1].id]
    assert done[0]["key"] == tenants.key("bob")
    # a cursor of somebody else's shows nothing that is not one's own
    page = tenants.ask("ann", "GET", "/v1/merges", params={"limit": 1})
    others = tenants.ask("bob", "GET", "/v1/merges", params={"cursor": page.json()["next_cursor"]}).json()[
        "jobs"
    ]
    assert {job["id"] for job in others} <= expected["bob"]


def test_a_file_that_became_a_link_is_not_served(tenants: Tenants) -> None:
    job = tenants.jobs["bob"][1]
    path = f"/v1/merges/{job.id}/files/config.json"
    assert tenants.ask("bob", "GET", path).text == "bob's secret"
    merged = tenants.place / "bob/merged/config.json"
    merged.unlink()
    merged.symlink_to(tenants.place / "ann/merged/config.json")
    for name in ("bob", "root"):
        for method in ("GET", "HEAD"):
            answer = tenants.ask(name, method, path)
            assert answer.status_code == 403
            assert "secret" not in answer.text


def recipe(*models: str) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": model} for model in models]}


def body(place: Path, *models: str, output: str = "bob/out") -> dict[str, Any]:
    uris = [
        model if "://" in model or model.startswith("hub/") else (place / model).as_uri() for model in models
    ]
    return {"recipe": recipe(*uris), "output": output if "://" in output else (place / output).as_uri()}


@pytest.mark.parametrize("route", ["/v1/merges", "/v1/plans"])
def test_places_that_a_key_may_not_have_are_all_named_and_not_looked_at(
    tenants: Tenants, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouchable(*arguments: object, **_: object) -> None:
        raise AssertionError(f"{arguments} was asked for")

    for name in ("head", "list", "read_into", "check_writable"):
        monkeypatch.setattr(f"workers.store.stores.Stores.{name}", untouchable)
    sent = body(tenants.place, "bob/a", "ann/a", "ann/none", "hub/x", "s3://bucket/x", output="ann/out")
    answer = tenants.ask("bob", "POST", route, json=sent)
    assert answer.status_code == 403
    assert answer.json()["type"] == FORBIDDEN
    named = [error.partition(": ")[0] for error in answer.json()["errors"]]
    place = tenants.place.as_uri()
    assert named == [f"{place}/ann/a", f"{place}/ann/none", "hub/x", "s3://bucket/x", f"{place}/ann/out"]
    # what there is and what there is not is refused in the same words
    there, not_there = answer.json()["errors"][:2]
    assert there.replace("ann/a", "") == not_there.replace("ann/none", "")
    # also when the recipe is wrong by itself, which has everything looked at otherwise
    sent["recipe"]["parameters"] = {"weight": "heavy"}
    wrong = tenants.ask("bob", "POST", route, json=sent)
    assert wrong.status_code == 403, wrong.text
    sent["recipe"]["models"] = [{"model": f"{place}/ann/a"}, {"model": 7}]
    assert tenants.ask("bob", "POST", route, json=sent).status_code == 403
    assert tenants.store.list(9, key=tenants.key("bob")).records == tuple(reversed(tenants.jobs["bob"]))


@pytest.mark.parametrize(
    "model",
    ["bob/../ann/a", "bob/%2e%2e/ann/a", "bob2", "bob%2f..%2fann/a", "bob/link", "bob/link/", "bob/./link"],
)
def test_ways_out_of_a_directory(tenants: Tenants, model: str) -> None:
    (tenants.place / "bob/link").symlink_to(tenants.place / "ann/a")
    write_checkpoint(tenants.place / "bob2", fine_tune({"w": torch.arange(8.0)}, 1, 0.1))
    for route in ("/v1/plans", "/v1/merges"):
        sent = body(tenants.place, "bob/a")
        sent["recipe"]["models"].append({"model": f"{tenants.place.as_uri()}/{model}"})
        answer = tenants.ask("bob", "POST", route, json=sent)
        assert answer.status_code in {403, 422}, answer.text  # 422: it is no place at all
        assert answer.status_code == 403 or "'..'" in answer.text
        sent = body(tenants.place, "bob/a", "bob/b", output=f"{tenants.place.as_uri()}/{model}")
        assert tenants.ask("bob", "POST", route, json=sent).status_code in {403, 422}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_of_a_model_that_is_a_link_is_refused(tenants: Tenants, name: str) -> None:
    link = tenants.place / "bob/a" / name
    link.unlink(missing_ok=True)
    link.symlink_to(tenants.place / "ann/a/model.safetensors")
    answer = tenants.ask("bob", "POST", "/v1/plans", json=body(tenants.place, "bob/a", "bob/b"))
    assert answer.status_code == 403, answer.text
    assert answer.json()["errors"][0].startswith(link.as_uri())
    assert (
        tenants.ask("root", "POST", "/v1/plans", json=body(tenants.place, "bob/b", "ann/b")).status_code
        == 200
    )


def test_what_anothers_job_replaced_names_no_job_of_anothers(tenants: Tenants) -> None:
    shared = tenants.place / "shared"
    shared.mkdir()

    def merged(name: str, text: str) -> JobRecord:
        (shared / INDEX_FILE).write_text(text)
        digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        return tenants.done(
            name, shared.as_uri(), [{"name": INDEX_FILE, "size": len(text), "digest": digest}]
        )

    old, new = merged("bob", "one"), merged("ann", "two")
    for path in ("files", f"files/{INDEX_FILE}"):
        for name, named in (("bob", False), ("root", True)):
            answer = tenants.ask(name, "GET", f"/v1/merges/{old.id}/{path}")
            assert answer.status_code == 410
            assert (new.id in answer.text) == named
        assert tenants.ask("ann", "GET", f"/v1/merges/{new.id}/{path}").status_code == 200


def test_what_is_asked_once_is_asked_by_one_key(tenants: Tenants) -> None:
    """The same Idempotency-Key of two callers is two; another's job never comes back."""
    made = {}
    sent = body(tenants.place, "bob/a", "bob/b", output="bob/out")
    for name in ("bob", "root"):
        headers = {**bearer(tenants.token[name]), "Idempotency-Key": "the-same"}
        first, again = (tenants.http.post("/v1/merges", json=sent, headers=headers) for _ in range(2))
        assert (first.status_code, again.status_code) == (202, 202), again.text
        assert (again.json()["id"], again.headers["Idempotent-Replayed"]) == (first.json()["id"], "true")
        assert "Idempotent-Replayed" not in first.headers
        made[name] = first.json()["id"]
    assert made["bob"] != made["root"]
    ann = {**bearer(tenants.token["ann"]), "Idempotency-Key": "the-same"}
    assert tenants.http.post("/v1/merges", json=sent, headers=ann).status_code == 403


def test_a_webhook_is_no_place_that_is_read_or_written(tenants: Tenants) -> None:
    hook = {"url": "https://example.com/", "secret": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}
    sent = body(tenants.place, "bob/a", "bob/b") | {"webhook": hook}
    answer = tenants.ask("bob", "POST", "/v1/merges", json=sent)
    assert answer.status_code == 202, answer.text
    told = f"/v1/merges/{answer.json()['id']}/deliveries"
    assert tenants.ask("bob", "GET", told).json()["url"] == hook["url"]
    assert tenants.ask("ann", "GET", told).status_code == 404


def test_what_is_allowed_is_planned_and_queued(tenants: Tenants) -> None:
    sent = body(tenants.place, "bob/a", "bob/b")
    assert tenants.ask("bob", "POST", "/v1/plans", json=sent).status_code == 200
    answer = tenants.ask("bob", "POST", "/v1/merges", json=sent)
    assert answer.status_code == 202, answer.text
    record = tenants.store.get(answer.json()["id"])
    home = (tenants.place / "bob").as_uri()
    assert (record.key, record.access) == (tenants.key("bob"), Access(inputs=(home,), outputs=(home,)))
    assert "access" not in answer.json()
    assert tenants.ask("ann", "GET", answer.headers["location"]).status_code == 404


def test_hub_names_are_what_the_operator_maps_them_to(
    tenants: Tenants, valkey_url: str, valkey_namespace: str
) -> None:
    for name in "xy":
        write_checkpoint(tenants.place / "hub" / name, fine_tune({"w": torch.arange(8.0)}, 1, 0.1))
    out = (tenants.place / "out").as_uri()
    for inputs, expected in (
        (["hub:"], 200), ([(tenants.place / "hub").as_uri()], 200), ([(tenants.place / "hub/x").as_uri()], 403),
        ([], 403),
    ):  # fmt: skip
        token = make_key(valkey_url, valkey_namespace, ["submit"], inputs, [out])
        sent = body(tenants.place, "hub/x", "hub/y", output="out/1")
        answer = tenants.http.post("/v1/plans", json=sent, headers=bearer(token))
        assert answer.status_code == expected, answer.text
    token = make_key(valkey_url, valkey_namespace, ["submit"], ["hub:"], [out])
    sent = body(tenants.place, f"{tenants.place.as_uri()}/hub/x", "hub/y", output="out/1")
    answer = tenants.http.post("/v1/plans", json=sent, headers=bearer(token))
    assert answer.status_code == 403  # by its name alone


def test_quotas(tenants: Tenants, valkey_url: str, valkey_namespace: str) -> None:
    home = [(tenants.place / "bob").as_uri()]
    token = make_key(
        valkey_url, valkey_namespace, ["submit"], home, home, limits={"queued_jobs": 1, "input_bytes": 63}
    )
    sent = body(tenants.place, "bob/a", "bob/b")
    for route in ("plans", "merges"):
        answer = tenants.http.post(f"/v1/{route}", json=sent, headers=bearer(token))
        assert answer.status_code == 429
        assert "64 bytes" in answer.json()["detail"]
        assert answer.headers["retry-after"] == "3600"
    wrong = body(tenants.place, "bob/a", "bob/nothing")
    answer = tenants.http.post("/v1/plans", json=wrong, headers=bearer(token))
    assert answer.status_code == 422  # and all that is wrong is told
    limits = {"queued_jobs": 1, "input_bytes": 64}
    token = make_key(valkey_url, valkey_namespace, ["submit"], home, home, limits=limits)
    once = {**bearer(token), "Idempotency-Key": "a-key"}
    assert tenants.http.post("/v1/merges", json=sent, headers=once).status_code == 202
    answer = tenants.http.post("/v1/merges", json=sent, headers=bearer(token))
    assert answer.status_code == 429
    again = tenants.http.post("/v1/merges", json=sent, headers=once)  # counts against nothing
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (202, "true")
    assert answer.json()["type"] == "urn:mergemill:error:too_many_requests"
    assert int(answer.headers["retry-after"]) > 0


def test_priority(tenants: Tenants) -> None:
    sent = body(tenants.place, "bob/a", "bob/b")
    for name, priority, expected in (
        ("bob", -100, 202), ("bob", 0, 202), ("bob", 1, 403), ("root", 100, 202), ("root", 101, 422),
        ("bob", -101, 422), ("bob", "high", 422), ("bob", 0.5, 422),
    ):  # fmt: skip
        answer = tenants.ask(name, "POST", "/v1/merges", json=sent | {"priority": priority})
        assert answer.status_code == expected, (name, priority, answer.text)
        if expected == 202:
            assert tenants.store.get(answer.json()["id"]).priority == answer.json()["priority"] == priority
    text = f"merge_method: linear\nmodels: [{{model: {tenants.place}/bob/a}}, {{model: {tenants.place}/bob/b}}]\n"
    for route, priority, expected in (("merges", -7, 202), ("merges", 7, 403), ("plans", -7, 400)):
        where = {"output": (tenants.place / "bob/out").as_uri(), "priority": priority}
        kind = {**bearer(tenants.token["bob"]), "content-type": "application/yaml"}
        answer = tenants.http.post(f"/v1/{route}", params=where, content=text, headers=kind)
        assert answer.status_code == expected, answer.text
        if expected == 202:
            assert answer.json()["priority"] == priority
