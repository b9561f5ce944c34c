"""The client against a real API on a real Valkey."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import pytest
import uvicorn

from api.app import create_app
from api.server import Server
from mergemill import Client, Job
from service.jobs.jobstore import JobStore
from service.jobs.record import JobState
from service.jobs.transitions import CommitStarted, Event, Failed, PlanningStarted, Succeeded
from service.settings import Settings
from tests.servers.keys import make_key
from tests.service.job_steps import ALL_COMPLETE, PATHS, TO_RUNNING, fresh
from workers.errors import (
    CursorError,
    IdempotencyMismatchError,
    IllegalTransitionError,
    JobCancelledError,
    JobFailedError,
    JobNotFoundError,
    JobTimeoutError,
    NotReadyError,
    PlanError,
    RecipeError,
)

pytest_plugins = ["tests.servers.valkey"]

RECIPE = {"merge_method": "linear", "models": [{"model": "s3://bucket/a"}, {"model": "s3://bucket/b"}]}
NOWHERE = "merge-0" + "0" * 25


@pytest.fixture
def client(valkey_url: str, valkey_namespace: str) -> Iterator[Client]:
    """A client of an API of its own."""
    settings = Settings(redis_url=valkey_url, namespace=valkey_namespace)
    server = Server(uvicorn.Config(create_app(settings), log_config=None, lifespan="on"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        key = make_key(valkey_url, valkey_namespace)
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}/", api_key=key) as found:
            yield found
    finally:
        server.should_exit = True
        thread.join()


def record(
    store: JobStore, events: tuple[Event, ...], output: str = "s3://bucket/output", age: float = 0
) -> str:
    """A job to which this has happened."""
    job = fresh(time.time() - age).model_copy(update={"output": output})
    store.create(job)
    if events:
        happens(store, job.id, iter(events), len(events))
    return job.id


def happens(store: JobStore, job: str, events: Iterator[Event], count: int = 1) -> None:
    """The next things that happen to the only job of a store, by a scheduler's hand."""
    claimed = store.claim_next("test", 60)
    assert claimed is not None
    lease = claimed[1]
    for event in islice(events, count):
        store.apply(job, event, lease.token)
    store.release(lease)


@pytest.mark.valkey
class TestOnARealApi:
    def test_a_submitted_job_is_got_listed_cancelled_and_deleted(self, client: Client) -> None:
        job = client.submit(RECIPE, "s3://bucket/out/", shard_bytes=1000, overwrite=True, part_bytes=None)
        assert (job.state, job.output, job.method) == ("queued", "s3://bucket/out", "linear")
        assert job.body["options"]["shard_bytes"] == 1000
        assert job.body["options"]["overwrite"] is True
        assert client.get(job.id) == job
        assert client.list().jobs == (job,)
        assert not job.is_terminal
        with pytest.raises(IllegalTransitionError, match="cancel it"):
            client.delete(job.id)
        assert client.cancel(job.id).state == "cancelled"
        with pytest.raises(JobCancelledError, match=job.id):
            client.wait(job.id, timeout=5)
        client.delete(job.id)
        with pytest.raises(JobNotFoundError):
            client.get(job.id)

    def test_a_merge_is_submitted_once_for_a_key(self, client: Client) -> None:
        jobs = [client.submit(RECIPE, "s3://bucket/out", idempotency_key="mine") for _ in range(2)]
        assert jobs[0].id == jobs[1].id
        with pytest.raises(IdempotencyMismatchError):
            client.submit(RECIPE, "s3://bucket/other", idempotency_key="mine")
        assert client.submit(RECIPE, "s3://bucket/out").id != jobs[0].id

    def test_yaml_and_a_mapping_are_the_same(self, client: Client) -> None:
        text = "merge_method: linear\nmodels:\n  - model: s3://bucket/a\n  - {model: s3://bucket/b}\n"
        assert (
            client.submit(text, "s3://bucket/out").recipe == client.submit(RECIPE, "s3://bucket/out").recipe
        )

    def test_every_problem_of_a_recipe_is_listed(self, client: Client) -> None:
        wrong = {"merge_method": "ties", "models": [{"model": "s3://b/a", "parameters": {"density": 2}}]}
        with pytest.raises(RecipeError) as caught:
            client.submit(wrong, "s3://bucket/out")
        assert any("base_model" in problem for problem in caught.value.problems)
        assert any("density" in problem for problem in caught.value.problems)
        with pytest.raises(RecipeError, match="sharp_bytes"):
            client.submit(RECIPE, "s3://bucket/out", sharp_bytes=1)
        with pytest.raises(RecipeError, match="relative path"):
            client.submit({**RECIPE, "models": [{"model": "./here"}]}, "s3://bucket/out")

    def test_pages_follow_one_another(self, client: Client, job_store: JobStore) -> None:
        made = [record(job_store, (), age=7 - number) for number in range(7)]
        first = client.list(limit=3)
        assert [job.id for job in first.jobs] == made[:3:-1]
        assert first.next_cursor is not None
        assert [job.id for job in client.list(3, first.next_cursor).jobs] == made[3:0:-1]
        assert [job.id for job in client.jobs()] == made[::-1]
        client.cancel(made[4])
        assert [job.id for job in client.jobs("cancelled")] == [made[4]]
        with pytest.raises(RecipeError, match="state"):
            client.list(state="sleeping")
        with pytest.raises(CursorError, match="cursor"):
            client.list(cursor="nonsense")

    def test_what_is_not_there_is_said_to_be(self, client: Client) -> None:
        for ask in (client.get, client.cancel, client.files):
            with pytest.raises(JobNotFoundError, match=NOWHERE):
                ask(NOWHERE)
        with pytest.raises(JobNotFoundError, match="not the id"):
            client.get("../../readyz")

    def test_what_a_state_does_not_allow_is_a_conflict(self, client: Client, job_store: JobStore) -> None:
        job = record(job_store, PATHS[JobState.COMMITTING])
        with pytest.raises(IllegalTransitionError):
            client.cancel(job)
        with pytest.raises(NotReadyError, match="committing"):
            client.files(job)

    def test_waiting_shows_every_step_and_ends_with_success(
        self, client: Client, job_store: JobStore
    ) -> None:
        job = record(job_store, ())
        steps = iter([*PATHS[JobState.SUCCEEDED]])
        seen: list[Job] = []

        def on_progress(found: Job) -> None:
            seen.append(found)
            while not found.is_terminal:  # a shard that is completed, for one, is no news to the caller
                happens(job_store, job, steps)
                now = client.get(job)
                if (now.state, now.progress) != (found.state, found.progress):
                    break

        done = client.wait(job, on_progress, timeout=60)
        assert done == seen[-1]
        assert all((one.state, one.progress) != (two.state, two.progress) for one, two in pairwise(seen))
        assert done.state == "succeeded"
        assert list(dict.fromkeys(look.state for look in seen)) == [
            "queued", "planning", "running", "committing", "succeeded"
        ]  # fmt: skip
        assert done.progress.bytes_total == 3000
        assert done.price == {"parts": 3}
        assert done.notices == ("a notice",)

    def test_a_failed_job_raises_its_own_error(self, client: Client, job_store: JobStore) -> None:
        error = {"type": "PlanError", "detail": "one; two", "problems": ["one", "two"]}
        job = record(job_store, (PlanningStarted(), Failed(error)))
        with pytest.raises(JobFailedError, match=rf"{job} failed: one; two") as caught:
            client.wait(job)
        assert isinstance(caught.value.__cause__, PlanError)
        assert caught.value.__cause__.problems == ("one", "two")

    def test_waiting_has_an_end(self, client: Client) -> None:
        job = client.submit(RECIPE, "s3://bucket/out").id
        begun = time.monotonic()
        with pytest.raises(JobTimeoutError, match=job):
            client.wait(job, timeout=0.3)
        assert 0.3 <= time.monotonic() - begun < 5
        assert client.get(job).state == "queued"

    def test_a_merged_checkpoint_is_downloaded(
        self, client: Client, job_store: JobStore, tmp_path: Path
    ) -> None:
        source = tmp_path / "with space"
        source.mkdir()
        content = {"config.json": b"{}", "weights ü.bin": bytes(range(256)) * 1000}
        for name, data in content.items():
            (source / name).write_bytes(data)
        listing = [
            {"name": name, "size": len(data), "digest": f"sha256:{hashlib.sha256(data).hexdigest()}"}
            for name, data in content.items()
        ]
        events = (*TO_RUNNING, CommitStarted(), *ALL_COMPLETE, Succeeded({"files": listing}))
        job = record(job_store, events, source.as_uri())
        assert [(file.name, file.size) for file in client.files(job)] == [
            (name, len(data)) for name, data in content.items()
        ]
        big = hashlib.sha256(content["weights ü.bin"]).hexdigest()[:12]
        target = tmp_path / "target"
        target.mkdir()
        (target / f"weights ü.bin.{big}.part").write_bytes(content["weights ü.bin"][:100_000])
        client.download(job, target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == content

    def test_planning_methods_and_readiness(self, client: Client, tmp_path: Path) -> None:
        missing = (tmp_path / "none").as_uri()
        with pytest.raises(PlanError, match="no model here") as caught:
            client.plan({"merge_method": "linear", "models": [{"model": missing}, {"model": missing + "2"}]})
        assert len(caught.value.problems) == 2
        assert "ties" in [method["name"] for method in client.methods()]
        assert client.ready()["status"] == "ready"
