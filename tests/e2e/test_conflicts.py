"""Two jobs for one output: what the one that is refused is told of the other."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import redis
import torch

from service.jobs.record import JobState, new_job
from service.recipe import parse_recipe
from tests.e2e.bench import Bench, at_step
from tests.e2e.means import SHARD_BYTES, is_mean, recipe

pytestmark = pytest.mark.valkey

ANN, BOB = "a" * 12, "b" * 12


@pytest.mark.parametrize("lost", [False, True], ids=["by Redis", "by its claim"])
@pytest.mark.parametrize(("key", "named"), [(ANN, True), (BOB, False), (None, False)])
def test_the_job_of_another_key_is_not_named(
    bench: Bench,
    base: dict[str, torch.Tensor],
    tmp_path: Path,
    raw: redis.Redis,
    key: str | None,
    named: bool,
    lost: bool,
) -> None:
    first, second = submit_as(bench, tmp_path, ANN), submit_as(bench, tmp_path, key)

    def run_second() -> None:
        if lost:
            assert raw.delete(f"{bench.settings.namespace}:output:file://{tmp_path}/out") == 1
        record = bench.run(second)
        assert record.state == JobState.FAILED
        assert record.error is not None
        assert record.error["type"] == "OutputConflictError"
        assert (first in record.model_dump_json()) == named
        assert ("another job" in str(record.error["detail"])) != named

    assert bench.run(first, at_step("put progress", run_second)).state == JobState.SUCCEEDED
    assert is_mean(tmp_path)


def submit_as(bench: Bench, root: Path, key: str | None) -> str:
    """Queue the merge for an API key."""
    options = bench.settings.default_options.model_dump(mode="json") | {"shard_bytes": SHARD_BYTES}
    wanted, output = parse_recipe(recipe(root)).to_json(), f"file://{root}/out"
    record = new_job(wanted, output, options, time.time(), key=key)
    return bench.jobs.create(record)
