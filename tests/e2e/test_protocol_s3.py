"""The protocol on a real Ceph gateway, where objects keep their metadata and uploads are nobody's files."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from service.jobs.record import JobState
from service.jobs.transitions import CancelRequested
from tests.checkpoints import fine_tune, llama_tensors, write_checkpoint
from tests.e2e.bench import Bench, Steps
from workers.store import StoreSettings, join
from workers.store.stores import read_bytes

pytestmark = [pytest.mark.valkey, pytest.mark.rgw]

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.fixture
def bench(valkey_url: str, rgw_settings: StoreSettings) -> Iterator[Bench]:
    """A runner to break."""
    made = Bench(valkey_url, f"test-{uuid.uuid4().hex}", rgw_settings)
    with made.jobs:
        yield made


@pytest.fixture
def recipe(bench: Bench, rgw_bucket: str, tmp_path: Path) -> dict[str, Any]:
    """The mean of two small checkpoints in the bucket."""
    base = llama_tensors(0, layers=1, hidden=48, heads=2, vocab=64, dtype=torch.float32)
    for name, tensors in {"base": base, "one": fine_tune(base, 1, 0.1)}.items():
        path = write_checkpoint(tmp_path / name, tensors) / "model.safetensors"
        bench.store.put(join(rgw_bucket, name, "model.safetensors"), path.read_bytes())
    return {
        "merge_method": "linear",
        "models": [{"model": f"{rgw_bucket}/{name}"} for name in ("one", "base")],
    }


def submit(bench: Bench, recipe: dict[str, Any], out: str, **options: Any) -> str:
    """Queue the merge into two shards."""
    return bench.submit(recipe, out, shard_bytes=90_000, **options)


def content(bench: Bench, out: str) -> dict[str, bytes]:
    """Everything at an output, after a look for uploads."""
    for shard in SHARDS:
        assert bench.store.list_uploads(join(out, shard)) == []
    return {info.uri[len(out) :]: read_bytes(bench.store, info.uri) for info in bench.store.list(out + "/")}


def test_a_crash_at_any_step_of_an_overwrite_changes_nothing_in_the_end(
    bench: Bench, recipe: dict[str, Any], rgw_bucket: str
) -> None:
    """The shards that it replaces were made by the same plan: their metadata tells nothing."""
    out = f"{rgw_bucket}/out"
    whole = Steps()
    assert bench.run(submit(bench, recipe, out)).state == JobState.SUCCEEDED
    record = bench.run(submit(bench, recipe, out, overwrite=True), whole)
    assert record.state == JobState.SUCCEEDED, record.error
    undisturbed = content(bench, out)
    assert sorted(undisturbed) == sorted(
        f"/{name}" for name in (*SHARDS, INDEX, "README.md", "mergemill.json")
    )
    for number, name in enumerate(whole.names):
        if name.startswith(("apply plan", "record_part", "claim_output")):
            continue  # nothing has happened in the store since the step before
        job = submit(bench, recipe, out, overwrite=True)
        bench.run_until(job, number)
        record = bench.run(job)
        assert record.state == JobState.SUCCEEDED, f"{name}: {record.error}"
        assert content(bench, out) == undisturbed, name


def test_giving_up_leaves_the_checkpoint_that_the_same_plan_made_before(
    bench: Bench, recipe: dict[str, Any], rgw_bucket: str
) -> None:
    out = f"{rgw_bucket}/out"
    assert bench.run(submit(bench, recipe, out)).state == JobState.SUCCEEDED
    before = content(bench, out)
    job = submit(bench, recipe, out, overwrite=True)

    def cancel(_: int, when: str, name: str) -> None:
        if when == "before" and name == "apply commit_started":
            bench.jobs.apply(job, CancelRequested())

    assert bench.run(job, Steps(cancel)).state == JobState.CANCELLED
    assert content(bench, out) == before


def test_an_upload_that_was_opened_twice_is_aborted_in_the_end(
    bench: Bench, recipe: dict[str, Any], rgw_bucket: str
) -> None:
    """As when the first answer is lost and the client asks again."""
    out = f"{rgw_bucket}/out"
    shard = join(out, SHARDS[0])

    def open_again(_: int, when: str, name: str) -> None:
        if when == "after" and name == f"open_upload {SHARDS[0]}":
            bench.store.open_upload(shard, 1, {})
            assert len(bench.store.list_uploads(shard)) == 2

    assert bench.run(submit(bench, recipe, out), Steps(open_again)).state == JobState.SUCCEEDED
    assert SHARDS[0] in {name[1:] for name in content(bench, out)}
