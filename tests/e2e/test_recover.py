"""What is recovered from when it is damaged, old, in use, out of reach or forged, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner, Result

from mergemill import cli
from service.jobs.record import JobState
from service.keys import Scope, new_key
from service.keystore import KeyStore
from service.running.claim import read_claim
from tests.e2e.bench import Bench
from tests.e2e.lost import killed, lose, recovered, submit
from tests.e2e.overwriting import INDEX, content
from workers.errors import (
    DamagedClaimError,
    ForbiddenError,
    NothingToRecoverError,
    OutputConflictError,
    StoreUnavailableError,
)
from workers.store import join

pytestmark = pytest.mark.valkey


def test_nothing_to_recover(bench: Bench, models: Path, tmp_path: Path) -> None:
    with pytest.raises(
        NothingToRecoverError, match="claimed by no job: what was lost had written nothing there"
    ):
        recovered(bench, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert bench.run(submit(bench, models, tmp_path / "out")).state == JobState.SUCCEEDED
    with pytest.raises(NothingToRecoverError, match=f"holds a checkpoint.*{INDEX}"):
        recovered(bench, tmp_path / "out")


@pytest.mark.parametrize(
    "damage",
    [
        lambda claim: b"",
        lambda claim: json.dumps(claim).encode()[:-9],
        lambda claim: b"[1]",
        lambda claim: b"[" * 100_000,
        lambda claim: json.dumps({**claim, "job": "another"}).encode(),
        lambda claim: json.dumps({**claim, "shards": ["../../etc/passwd"]}).encode(),
        lambda claim: json.dumps({**claim, "recipe": {"merge_method": "linear"}}).encode(),
        lambda claim: json.dumps({**claim, "options": {"shard_bytes": "big"}}).encode(),
        lambda claim: json.dumps({**claim, "planned": {"parts_total": 7}}).encode(),
        lambda claim: json.dumps({**claim, "priority": 1000}).encode(),
    ],
)
def test_a_damaged_claim_is_refused_and_kept(
    bench: Bench,
    models: Path,
    tmp_path: Path,
    raw: redis.Redis,
    damage: Callable[[dict[str, Any]], bytes],
) -> None:
    job = submit(bench, models, tmp_path / "out")
    killed(bench, job, "record_part")
    lose(bench, raw)
    path = tmp_path / "out" / ".mergemill" / "claim.json"
    path.write_bytes(damage(json.loads(path.read_bytes())))
    before = content(tmp_path / "out")
    with pytest.raises(DamagedClaimError, match="claim"):
        recovered(bench, tmp_path / "out")
    assert raw.keys(f"{bench.settings.namespace}:*") == []
    late = bench.run(submit(bench, models, tmp_path / "out"))  # nor does another job take what it cannot read
    assert late.state == JobState.FAILED
    assert content(tmp_path / "out") == before


def test_damaged_progress_is_made_up_for(
    bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis
) -> None:
    job = submit(bench, models, tmp_path / "out")
    killed(bench, job, "complete model-00002")
    lose(bench, raw)
    (page,) = (tmp_path / "out").glob(".mergemill/progress-*.json")
    page.write_bytes(page.read_bytes()[:-40])
    found = recovered(bench, tmp_path / "out")
    assert (found.record.state, found.parts) == (JobState.RUNNING, 0)
    record = bench.run(job)  # the first shard is complete, and what it is made of is not known
    assert record.state == JobState.SUCCEEDED
    assert "restarted" in [entry.event for entry in record.history]
    assert bench.run(submit(bench, models, tmp_path / "whole")).state == JobState.SUCCEEDED
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_claim_of_before_is_recovered(bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis) -> None:
    """They said less about their jobs."""
    job = submit(bench, models, tmp_path / "out")
    killed(bench, job, "record_part", "after")
    lose(bench, raw)
    path = tmp_path / "out" / ".mergemill" / "claim.json"
    old = json.loads(path.read_bytes())
    for name in ("planned", "key", "priority", "origin", "created_at"):
        del old[name]
    path.write_text(json.dumps(old))
    found = recovered(bench, tmp_path / "out")
    assert (found.record.id, found.record.state) == (job, JobState.QUEUED)
    record = bench.run(job)
    assert record.state == JobState.SUCCEEDED
    assert record.uploads == old["uploads"]


def test_a_job_that_was_submitted_meanwhile_keeps_the_output(
    bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis
) -> None:
    lost = submit(bench, models, tmp_path / "out")
    killed(bench, lost, "apply commit_started")
    lose(bench, raw)
    other = submit(bench, models, tmp_path / "out")
    killed(bench, other, "put_if_absent claim.json")
    with pytest.raises(OutputConflictError, match=other):
        recovered(bench, tmp_path / "out")
    assert bench.run(other).state == JobState.FAILED  # by the claim of the lost one, which it leaves alone
    assert recovered(bench, tmp_path / "out").was_lost
    assert bench.run(lost).state == JobState.SUCCEEDED
    late = bench.run(submit(bench, models, tmp_path / "out"))
    assert late.state == JobState.FAILED


def test_a_recovered_job_has_its_output_before_anybody_else(
    bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis
) -> None:
    lost = submit(bench, models, tmp_path / "out")
    killed(bench, lost, "apply commit_started")
    lose(bench, raw)
    recovered(bench, tmp_path / "out")
    other = bench.run(submit(bench, models, tmp_path / "out"))
    assert other.error is not None
    assert f"the output of the job {lost}, which goes on" in str(other.error["detail"])
    assert bench.run(lost).state == JobState.SUCCEEDED


def test_a_store_that_is_out_of_reach_leaves_nothing(
    bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis
) -> None:
    job = submit(bench, models, tmp_path / "out")
    killed(bench, job, "complete model-00002")
    lose(bench, raw)

    class Gone:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            if name == self._name:
                raise StoreUnavailableError("no route")
            return getattr(bench.store, name)

    for name in ("head", "list", "list_uploads"):
        with pytest.raises(StoreUnavailableError):
            recovered(bench, tmp_path / "out", store=Gone(name))
        assert raw.keys(f"{bench.settings.namespace}:*") == []
    assert recovered(bench, tmp_path / "out").was_lost


def test_a_claim_allows_its_job_nothing(bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis) -> None:
    """Who can write to an output could have written any recipe into its claim, with any key and priority."""
    job = submit(bench, models, tmp_path / "out")
    killed(bench, job, "record_part", "after")
    lose(bench, raw)
    path = tmp_path / "out" / ".mergemill" / "claim.json"
    claim = json.loads(path.read_bytes())
    path.write_text(json.dumps({**claim, "key": "0" * 12, "priority": 100}))
    admin, _ = new_key("admin", [Scope.ADMIN], 0, inputs=["*"], outputs=["*"])
    ann, _ = new_key("ann", [Scope.SUBMIT], 0, inputs=[str(models)], outputs=[str(tmp_path)])
    bob, _ = new_key("bob", [Scope.SUBMIT], 0, inputs=[str(models / "one")], outputs=["*"])
    with pytest.raises(NothingToRecoverError, match="--key ID"):
        recovered(bench, tmp_path / "out", whose=None)
    with pytest.raises(ForbiddenError, match="base"):
        recovered(bench, tmp_path / "out", whose=bob)
    found = recovered(bench, tmp_path / "out", whose=ann).record
    assert (found.key, found.priority) == (ann.id, 0)
    assert found.access is not None
    assert found.access.inputs == ann.inputs
    lose(bench, raw)
    found = recovered(bench, tmp_path / "out", whose=admin).record
    assert (found.key, found.priority) == (admin.id, 100)
    assert bench.run(job).state == JobState.SUCCEEDED


def test_the_command(
    bench: Bench, models: Path, tmp_path: Path, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, namespace, out = bench.settings.redis_url, bench.settings.namespace, str(tmp_path / "out")
    env = {"MERGEMILL_REDIS_URL": url, "MERGEMILL_NAMESPACE": namespace}

    def run(*arguments: str, **more: str) -> Result:
        return CliRunner().invoke(cli.app, ["recover", *arguments], env={**env, **more})

    nothing = run(out, MERGEMILL_AUTH="off")
    assert (nothing.exit_code, "claimed by no job" in nothing.stderr) == (1, True)
    job = submit(bench, models, tmp_path / "out")
    killed(bench, job, "complete model-00002")
    lose(bench, raw)
    nobody = run(out)
    assert (nobody.exit_code, "--key ID" in nobody.stderr) == (1, True)
    assert run(out, "--key", "0" * 12).exit_code == 1
    key, _ = new_key("admin", [Scope.ADMIN], 0, inputs=["*"], outputs=["*"])
    with KeyStore(url, namespace) as keys:
        keys.create(key)
    monkeypatch.chdir(tmp_path)
    made = run("out", "--key", key.id)
    assert (made.exit_code, made.stdout) == (
        0,
        f"{job} is recovered: committing, 2 of 2 parts are finished\n",
    )
    again = run("out", "--json")
    assert again.exit_code == 0
    assert json.loads(again.stdout) == {
        "id": job, "state": "committing", "recovered": False, "parts_done": 2, "parts_total": 2,
    }  # fmt: skip
    assert bench.jobs.get(job).key == key.id
    assert bench.run(job).state == JobState.SUCCEEDED


def test_a_claim_holds_what_is_needed_and_no_more(bench: Bench, models: Path, tmp_path: Path) -> None:
    job = submit(bench, models, tmp_path / "out")
    record = killed(bench, job, "record_part")
    claim = read_claim(bench.store, join(record.output))
    assert claim is not None
    assert claim.planned is not None
    assert claim.planned.plan_digest == record.plan_digest
    assert claim.uploads == record.uploads
    assert not {"access", "webhook", "secret"} & set(claim.model_dump())
