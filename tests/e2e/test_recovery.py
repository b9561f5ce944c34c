"""What a job does when answers, records, parts, inputs or the output are not what they were."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from service.jobs.record import JobRecord, JobState
from service.jobs.transitions import CancelRequested
from service.running.runner import MAX_OUTAGES
from tests.checkpoints import fine_tune, write_checkpoint
from tests.e2e.bench import Bench, KilledError, Steps, at_step, raising
from tests.e2e.means import SHARD_BYTES, is_mean, nothing_at, submit
from workers.errors import AlreadyExistsError, StoreUnavailableError
from workers.store import join

pytestmark = pytest.mark.valkey

INDEX = "model.safetensors.index.json"
LOST = StoreUnavailableError("the answer was lost")


def events(record: JobRecord, name: str) -> int:
    """How often something happened to a job."""
    return sum(entry.event == name for entry in record.history)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "step",
    [
        "put_if_absent claim",
        "open_upload",
        "put claim",
        "complete model-00001",
        "complete model-00002",
        "put README",
        "put mergemill",
        f"put_if_absent {INDEX}",
        "delete claim",
    ],
)
def test_a_store_that_loses_a_request_or_its_answer_does_not_end_the_job(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, step: str, when: str
) -> None:
    job = submit(bench, tmp_path)
    steps = at_step(step, raising(LOST), when)
    record = bench.run(job, steps)
    assert record.state == JobState.SUCCEEDED, record.error
    assert events(record, "restarted") == 0
    assert len(bench.driver.labels) == record.parts_total == 2
    assert any(name.startswith(step) for name in steps.names)
    assert is_mean(tmp_path)


def test_a_refusal_to_put_what_is_our_own_index_is_no_error(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = submit(bench, tmp_path)
    steps = at_step(f"put_if_absent {INDEX}", raising(AlreadyExistsError("it is there")), "after")
    assert bench.run(job, steps).state == JobState.SUCCEEDED
    assert is_mean(tmp_path)


def test_a_store_that_stays_away_fails_the_job_in_the_end(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, raw: redis.Redis
) -> None:
    def gone(_: int, moment: str, name: str) -> None:
        if moment == "before" and name.startswith("complete"):
            raise LOST

    record = bench.run(submit(bench, tmp_path), Steps(gone))
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert record.error["type"] == "StoreUnavailableError"
    told: Any = raw.xrange(f"{bench.jobs._namespace}:job:{record.id}:events")
    warnings = [fields["entry"] for _, fields in told if fields["event"] == "warning"]
    assert len(warnings) == MAX_OUTAGES
    assert all("trying again: the answer was lost" in entry for entry in warnings)
    assert nothing_at(tmp_path / "out")


def test_a_store_that_goes_away_now_and_then_does_not_end_a_job_that_gets_on(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Six outages are more than a job bears in a row."""
    steps = ("open_upload", "complete", "put README", "put mergemill")
    seen: set[str] = set()

    def gone(_: int, moment: str, name: str) -> None:
        if moment == "before" and name.startswith(steps) and name not in seen:
            seen.add(name)
            raise LOST

    record = bench.run(submit(bench, tmp_path), Steps(gone))
    assert len(seen) == 6 > MAX_OUTAGES
    assert record.state == JobState.SUCCEEDED, record.error
    assert is_mean(tmp_path)


def test_a_job_that_waits_for_the_store_can_be_cancelled(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    slow = Bench(bench.settings.redis_url, bench.settings.namespace, outage_seconds=3600.0)
    job = submit(slow, tmp_path)

    def cancel_and_lose() -> None:
        slow.jobs.apply(job, CancelRequested())
        raise LOST

    with slow.jobs:
        record = slow.run(job, at_step("open_upload", cancel_and_lose))
    assert record.state == JobState.CANCELLED
    assert nothing_at(tmp_path / "out")


def test_somebody_elses_index_is_not_overwritten(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    def intrude() -> None:
        (tmp_path / "out" / INDEX).write_text("{}")

    record = bench.run(submit(bench, tmp_path), at_step(f"put_if_absent {INDEX}", intrude))
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert "written by somebody else" in str(record.error["detail"])
    assert (tmp_path / "out" / INDEX).read_text() == "{}"


def test_somebody_elses_index_is_not_deleted_once_an_overwrite_has_begun(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "out", fine_tune(base, 9))
    job = submit(bench, tmp_path, overwrite=True)
    with pytest.raises(KilledError):
        bench.run(job, at_step("complete model-00002", raising(KilledError())))
    (tmp_path / "out" / INDEX).write_text("{}")
    record = bench.run(job)
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert "written by somebody else" in str(record.error["detail"])
    assert (tmp_path / "out" / INDEX).read_text() == "{}"


def test_a_checkpoint_that_appears_while_a_job_plans_is_not_touched(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Two jobs look, and find nothing; one finishes before the other claims."""
    other = submit(bench, tmp_path)
    before: dict[str, bytes] = {}

    def finish_other() -> None:
        assert bench.run(other).state == JobState.SUCCEEDED
        before.update({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})

    write_checkpoint(tmp_path / "two", fine_tune(base, 2, 0.1))
    wanted = {"merge_method": "linear", "models": [{"model": str(tmp_path / "two")}]}
    late = bench.submit(wanted, tmp_path / "out", shard_bytes=SHARD_BYTES)
    record = bench.run(late, at_step("claim_output", finish_other))
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert "already holds a checkpoint" in str(record.error["detail"])
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_of_two_jobs_for_one_output_one_is_refused(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    first, second = submit(bench, tmp_path), submit(bench, tmp_path)

    def run_second() -> None:
        record = bench.run(second)
        assert record.state == JobState.FAILED
        assert record.error is not None
        assert first in str(record.error["detail"])

    assert bench.run(first, at_step("put progress", run_second)).state == JobState.SUCCEEDED
    assert is_mean(tmp_path)


def test_the_claim_of_a_job_that_has_ended_is_taken_over(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The first job is cancelled while the store refuses to let anything be cleaned up."""
    first = submit(bench, tmp_path)

    def cancel_and_cut(_: int, moment: str, name: str) -> None:
        if name == "record_part" and moment == "before":
            bench.jobs.apply(first, CancelRequested())
        if name.startswith("abort") and moment == "before":
            raise LOST

    assert bench.run(first, Steps(cancel_and_cut)).state == JobState.CANCELLED
    shard = join(f"file://{tmp_path}/out", "model-00001-of-00002.safetensors")
    assert bench.store.list_uploads(shard)
    assert bench.run(submit(bench, tmp_path)).state == JobState.SUCCEEDED
    assert bench.store.list_uploads(shard) == []
    assert is_mean(tmp_path)


def test_the_claim_of_a_job_that_nobody_knows_is_respected(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, valkey_url: str
) -> None:
    elsewhere = Bench(valkey_url, f"test-{uuid.uuid4().hex}")
    with elsewhere.jobs:
        other = submit(elsewhere, tmp_path)
        with pytest.raises(KilledError):
            elsewhere.run(other, at_step("put progress", raising(KilledError())))
        record = bench.run(submit(bench, tmp_path))
        assert record.state == JobState.FAILED
        assert record.error is not None
        for words in (
            other,
            "wait for it or cancel it",
            f"delete file://{tmp_path}/out/.mergemill/claim.json",
        ):
            assert words in str(record.error["detail"])
        assert elsewhere.run(other).state == JobState.SUCCEEDED  # nothing of it was touched
    assert is_mean(tmp_path)


def test_parts_that_redis_lost_are_found_beside_the_output(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = submit(bench, tmp_path)
    with pytest.raises(KilledError):
        bench.run(job, at_step("apply commit_started", raising(KilledError())))
    assert len(bench.driver.labels) == 2
    with redis.Redis.from_url(bench.settings.redis_url) as server:
        key = f"{bench.settings.namespace}:job:{job}"
        assert server.delete(f"{key}:parts", f"{key}:progress") == 2
    assert bench.jobs.parts(job) == {}
    record = bench.run(job)
    assert record.state == JobState.SUCCEEDED
    assert len(bench.driver.labels) == 2  # nothing was done again
    assert len(bench.jobs.parts(job)) == 2
    assert is_mean(tmp_path)


def test_a_part_that_the_store_lost_is_made_again(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    job = submit(bench, tmp_path)
    with pytest.raises(KilledError):
        bench.run(job, at_step("apply commit_started", raising(KilledError())))
    (note, *_) = (tmp_path / "out").glob(".mergemill/uploads/*/parts/1.json")
    note.unlink()
    record = bench.run(job)
    assert record.state == JobState.SUCCEEDED
    assert events(record, "restarted") == 0
    assert len(bench.driver.labels) == 3
    assert is_mean(tmp_path)


@pytest.mark.parametrize("at", ["apply commit_started", "complete model-00002"])
def test_an_upload_that_the_store_lost_starts_the_job_over(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, at: str
) -> None:
    job = submit(bench, tmp_path)
    with pytest.raises(KilledError):
        bench.run(job, at_step(at, raising(KilledError())))
    (upload,) = bench.store.list_uploads(join(f"file://{tmp_path}/out", "model-00002-of-00002.safetensors"))
    bench.store.abort(upload)
    record = bench.run(job)
    assert record.state == JobState.SUCCEEDED
    assert events(record, "restarted") == 1
    assert is_mean(tmp_path)


def test_uploads_that_vanish_again_and_again_fail_the_job(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    uri = join(f"file://{tmp_path}/out", "model-00001-of-00002.safetensors")

    def sweep(_: int, moment: str, name: str) -> None:
        if moment == "after" and name == "apply commit_started":
            for upload in bench.store.list_uploads(uri):
                bench.store.abort(upload)

    record = bench.run(submit(bench, tmp_path), Steps(sweep))
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert record.error["type"] == "UploadNotFoundError"
    assert nothing_at(tmp_path / "out")


def test_an_input_that_changes_after_planning_fails_the_job_by_name(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    def change() -> None:
        write_checkpoint(tmp_path / "one", fine_tune(base, 3, 0.1))

    record = bench.run(submit(bench, tmp_path), at_step("apply uploads_opened", change))
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert record.error["type"] == "ObjectChangedError"
    assert f"file://{tmp_path}/one/model.safetensors" in str(record.error["detail"])
    assert nothing_at(tmp_path / "out")


def test_an_input_that_is_cut_short_after_planning_fails_the_job_by_name(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "one" / "model.safetensors"

    def cut() -> None:
        os.truncate(path, path.stat().st_size - 1000)

    record = bench.run(submit(bench, tmp_path), at_step("apply uploads_opened", cut))
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert str(path) in str(record.error["detail"])
    assert nothing_at(tmp_path / "out")


@pytest.mark.parametrize("at", ["put progress", "complete model-00002", "put README"])
def test_an_input_that_changes_before_a_resume_starts_the_job_over(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, at: str
) -> None:
    job = submit(bench, tmp_path)
    with pytest.raises(KilledError):
        bench.run(job, at_step(at, raising(KilledError())))
    write_checkpoint(tmp_path / "one", fine_tune(base, 3, 0.1))
    record = bench.run(job)
    assert record.state == JobState.SUCCEEDED, record.error
    assert events(record, "restarted") == 1
    assert is_mean(tmp_path)  # of the new input alone


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("at", ["delete claim", "apply succeeded"])
def test_a_commit_that_was_made_stands_whatever_becomes_of_the_inputs(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, at: str, overwrite: bool
) -> None:
    if overwrite:
        write_checkpoint(tmp_path / "out", fine_tune(base, 9))
    job = submit(bench, tmp_path, overwrite=overwrite)
    with pytest.raises(KilledError):
        bench.run(job, at_step(at, raising(KilledError())))
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "aside")
    record = bench.run(job)
    assert record.state == JobState.SUCCEEDED, record.error
    assert record.summary is not None
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted(file["name"] for file in record.summary["files"])  # type: ignore[index, union-attr]
    (tmp_path / "aside").rename(tmp_path / "one" / "model.safetensors")
    assert is_mean(tmp_path)


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_look_at_the_output_left_that_was_cut_short_goes_with_the_job(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, fails: bool
) -> None:
    claim = join(f"file://{tmp_path}/out", ".mergemill", "claim.json")
    bench.store.open_upload(
        claim, 1, {}
    )  # as on S3, where a place is tried by an upload that is aborted at once
    if fails:
        (tmp_path / "one" / "model.safetensors").unlink()
    record = bench.run(submit(bench, tmp_path))
    assert record.state == (JobState.FAILED if fails else JobState.SUCCEEDED), record.error
    assert bench.store.list_uploads(claim) == []
    assert nothing_at(tmp_path / "out") if fails else is_mean(tmp_path)
