"""A job whose earlier merge is staged: killed, cancelled, lost and swept at every step, it leaves what it should."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import redis

from service.jobs.record import JobRecord, JobState
from service.jobs.transitions import CancelRequested
from service.running.commit import Output, for_ever
from service.running.retention import Retention
from tests.checkpoints import read_checkpoint
from tests.e2e.bench import Bench, Steps, at_step
from tests.e2e.lost import killed, lose, recovered
from tests.e2e.means import nothing_at
from tests.e2e.overwriting import content
from workers.store import join
from workers.store.uris import from_path

pytestmark = pytest.mark.valkey

SHARD_BYTES = 90_000
HIDDEN = ".mergemill"


def recipe(root: Path) -> dict[str, Any]:
    """TIES, staged, and then a mean with what it was made of."""
    base, one = str(root / "base"), str(root / "one")
    ties = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": one}],
        "parameters": {"density": 0.3},
    }
    mean = {"merge_method": "linear", "models": [{"model": "voted"}, {"model": one}]}
    return {"documents": [mean, {"name": "voted", **ties}]}


def submit(bench: Bench, root: Path, out: Path) -> str:
    """Queue the merge."""
    return bench.submit(recipe(root), out, shard_bytes=SHARD_BYTES)


def restarts(record: JobRecord) -> int:
    """How often a job began anew."""
    return sum(entry.event == "restarted" for entry in record.history)


@pytest.fixture(scope="module")
def kept() -> dict[str, Any]:
    """What an undisturbed job makes, and its steps."""
    return {}


@pytest.fixture
def wanted(bench: Bench, models: Path, tmp_path_factory: pytest.TempPathFactory, kept: dict[str, Any]) -> Any:
    """The output's place, what an undisturbed job makes there, and the steps that it takes."""
    if not kept:
        out, steps = tmp_path_factory.mktemp("place") / "out", Steps()
        record = bench.run(submit(bench, models, out), steps)
        assert record.state == JobState.SUCCEEDED, record.error
        kept |= {"out": out, "content": content(out), "steps": steps.names, "record": record}
        kept["labels"] = len(bench.driver.labels)
    shutil.rmtree(kept["out"], ignore_errors=True)
    return kept


def test_what_is_made_and_told(wanted: Any, models: Path) -> None:
    record: JobRecord = wanted["record"]
    names, steps = set(wanted["content"]), wanted["steps"]
    assert not any("stage" in name or name.startswith(".") for name in names)
    assert sum(name.endswith(".safetensors") for name in names) == 2
    completed = [step for step in steps if step.startswith("complete")]
    assert [step.startswith("complete stage-") for step in completed] == [True, True, False, False]
    assert steps.index("apply commit_started") > steps.index(completed[1])
    assert record.parts_total == wanted["labels"] == 4
    size = sum(len(data) for name, data in wanted["content"].items() if name.endswith(".safetensors"))
    assert record.bytes_total == record.price["bytes_written"] > 1.9 * size  # type: ignore[index]
    assert b"stage-" not in b"".join(data for name, data in wanted["content"].items())
    assert b"documents" in wanted["content"]["mergemill.json"]


def test_killed_before_any_step_of_a_stage_it_makes_the_same_bytes(
    bench: Bench, models: Path, wanted: Any
) -> None:
    out: Path = wanted["out"]
    steps = wanted["steps"]
    for number in range(steps.index("record_part"), steps.index("apply commit_started") + 2):
        job = submit(bench, models, out)
        before = len(bench.driver.labels)
        bench.run_until(job, number)
        record = bench.run(job)
        assert record.state == JobState.SUCCEEDED, (number, record.error)
        assert restarts(record) == 0, number
        assert len(bench.driver.labels) - before <= wanted["labels"] + 2  # two parts may be recorded at once
        assert content(out) == wanted["content"], number
        shutil.rmtree(out)


@pytest.mark.parametrize("step", ["record_part", "complete stage-", "apply shard_completed", "put progress"])
def test_cancelled_while_it_stages_it_leaves_nothing(
    bench: Bench, models: Path, wanted: Any, step: str
) -> None:
    job = submit(bench, models, wanted["out"])

    def cancel() -> None:
        bench.jobs.apply(job, CancelRequested())

    record = bench.run(job, at_step(step, cancel, "after"))
    assert record.state == JobState.CANCELLED
    assert nothing_at(wanted["out"])


def test_a_stage_that_is_gone_is_made_again(bench: Bench, models: Path, wanted: Any) -> None:
    job = submit(bench, models, wanted["out"])
    last = [step for step in wanted["steps"] if step.startswith("complete stage-")][-1]
    killed(bench, job, last, "after")
    (staged,) = sorted((wanted["out"] / HIDDEN).glob("stage-*-model-00001-*"))
    staged.unlink()
    record = bench.run(job)
    assert record.state == JobState.SUCCEEDED, record.error
    assert restarts(record) == 1
    assert content(wanted["out"]) == wanted["content"]


@pytest.mark.parametrize("step", ["complete stage-", "apply commit_started"])
def test_a_job_that_redis_lost_goes_on_from_its_stages(
    bench: Bench, models: Path, wanted: Any, raw: redis.Redis, step: str
) -> None:
    job = submit(bench, models, wanted["out"])
    killed(bench, job, step, "after")
    lose(bench, raw)
    done = recovered(bench, wanted["out"])
    assert (done.was_lost, done.parts) == (True, 2 if step.startswith("complete") else 4)
    before = len(bench.driver.labels)
    record = bench.run(job)
    assert record.state == JobState.SUCCEEDED, record.error
    assert len(bench.driver.labels) - before == 4 - done.parts
    assert content(wanted["out"]) == wanted["content"]


def test_what_nobody_works_at_is_swept(bench: Bench, models: Path, wanted: Any) -> None:
    job = submit(bench, models, wanted["out"])
    killed(bench, job, "complete stage-", "after")
    place = from_path(str(wanted["out"]))
    (wanted["out"] / HIDDEN / "claim.json").unlink()
    bench.store.open_upload(join(place, HIDDEN, f"stage-{'0' * 32}-model-00001-of-00001.safetensors"), 9, {})
    retention = Retention(1e9, 0)
    output = Output(bench.store, place, job, for_ever)
    assert output.sweep(lambda name, at: retention.is_abandoned(name, at, at + 100)) > 3
    assert nothing_at(wanted["out"])


def test_the_bytes_are_those_of_the_documents_one_by_one(
    bench: Bench, models: Path, wanted: Any, tmp_path: Path
) -> None:
    mean, ties = recipe(models)["documents"]
    assert bench.run(bench.submit(ties, tmp_path / "voted")).state == JobState.SUCCEEDED
    mean["models"][0]["model"] = str(tmp_path / "voted")
    assert (
        bench.run(bench.submit(mean, tmp_path / "out", shard_bytes=SHARD_BYTES)).state == JobState.SUCCEEDED
    )
    assert bench.run(submit(bench, models, wanted["out"])).state == JobState.SUCCEEDED
    one, two = read_checkpoint(tmp_path / "out"), read_checkpoint(wanted["out"])
    assert all(one[name].equal(two[name]) for name in one)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert all((tmp_path / "out" / name).read_bytes() == wanted["content"][name] for name in shards)
