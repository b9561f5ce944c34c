"""A job may die at any step: it ends as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from service.jobs.record import JobState
from tests.checkpoints import read_checkpoint
from tests.e2e.bench import Bench, Steps
from tests.e2e.overwriting import INDEX, PREPARATIONS, SHARD_BYTES, content, recipe, same_layout

pytestmark = pytest.mark.valkey


class Undisturbed:
    """What a merge does, and leaves, when nothing happens to it."""

    def __init__(self, bench: Bench, models: Path, out: Path, prepare: Callable[[Path], None] | None) -> None:
        if prepare is not None:
            prepare(out)
        steps = Steps()
        job = bench.submit(recipe(models), out, shard_bytes=SHARD_BYTES, overwrite=prepare is not None)
        record = bench.run(job, steps)
        assert record.state == JobState.SUCCEEDED, record.error
        self.steps = steps.names
        self.content = content(out)
        self.summary = record.summary


def loadable(out: Path) -> dict[str, torch.Tensor] | None:
    """What a user who opens the output now gets."""
    if (out / INDEX).exists() or (out / "model.safetensors").exists():
        return read_checkpoint(out)
    return None


def is_either(found: dict[str, torch.Tensor] | None, *whole: dict[str, torch.Tensor]) -> bool:
    """Whether nothing is loadable, or one of these checkpoints as a whole."""
    return found is None or any(
        found.keys() == one.keys() and all(torch.equal(found[name], one[name]) for name in one)
        for one in whole
    )


@pytest.mark.parametrize("before", PREPARATIONS)
def test_a_crash_at_any_step_changes_nothing_in_the_end(
    bench: Bench, models: Path, tmp_path: Path, before: str
) -> None:
    prepare = PREPARATIONS[before]
    undisturbed = Undisturbed(bench, models, tmp_path / "undisturbed", prepare)
    new = read_checkpoint(tmp_path / "undisturbed")
    assert len([name for name in undisturbed.content if name.endswith(".safetensors")]) == 2
    if before == "same":
        same_layout(tmp_path / "old")
        assert (tmp_path / "old" / INDEX).read_text() == (tmp_path / "undisturbed" / INDEX).read_text()
    for number, name in enumerate(undisturbed.steps):  # after a step is before the next, or over
        out = tmp_path / str(number)
        whole = [new]
        if prepare is not None:
            prepare(out)
            whole.append(read_checkpoint(out))
        job = bench.submit(recipe(models), out, shard_bytes=SHARD_BYTES, overwrite=prepare is not None)
        where = f"before step {number}, {name}"
        bench.run_until(job, number)
        assert is_either(loadable(out), *whole), f"a mixture is loadable when it dies {where}"
        record = bench.run(job)
        assert record.state == JobState.SUCCEEDED, f"{where}: {record.error}"
        assert record.summary == undisturbed.summary, where
        assert content(out) == undisturbed.content, where
