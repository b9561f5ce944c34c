"""Surveys of whole models in a job: their passes run one after another, what they found is kept, none is repeated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from service.jobs.record import JobState
from tests.checkpoints import Tensors, read_checkpoint, write_checkpoint
from tests.e2e.bench import Bench, Steps
from workers.methods import METHODS
from workers.methods.evaluate import merge_tensors
from workers.methods.resolve import resolve_parameters

pytestmark = pytest.mark.valkey

MIB = 1 << 20
PARTS = {"part_bytes": 5 * MIB, "shard_bytes": 9 * MIB}


def write(root: Path, crowded: bool) -> dict[str, torch.Tensor]:
    """A base and a fine-tune of 14 MB, and what merging them gives.

    A task vector that is ``crowded`` has magnitudes at one end of a histogram's bin and no majority of signs, so
    that the second pass cannot tell.
    """
    sizes = {"w": (6 * MIB // 4 * 2,), "v": (500_000,), "u": (3, 5)}
    generator = torch.Generator().manual_seed(0)
    base: Tensors = {name: torch.zeros(size) for name, size in sizes.items()}
    tuned: Tensors = {}
    for name, size in sizes.items():
        values = torch.randint(0, 999, size, generator=generator, dtype=torch.int32) + 0x3F80_0000
        signs = torch.randint(0, 2, size, generator=generator).float() * 2 - 1
        tuned[name] = values.view(torch.float32) * signs if crowded else torch.rand(size, generator=generator)
    write_checkpoint(root / "base", base)
    write_checkpoint(root / "tuned", tuned)
    parameters, own = resolve_parameters(METHODS["ties"], "paper", {"density": 0.3}, [{}])
    return merge_tensors(METHODS["ties"], parameters, own, base, [tuned])


def submit(bench: Bench, root: Path) -> str:
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "profile": "paper",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / "tuned")}],
        "parameters": {"density": 0.3},
    }
    return bench.submit(recipe, root / "out", **PARTS)


def assert_done(bench: Bench, job: str, root: Path, expected: dict[str, torch.Tensor]) -> None:
    record = bench.jobs.get(job)
    assert record.state == JobState.SUCCEEDED, record.error
    merged = read_checkpoint(root / "out")
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def passes(labels: list[str]) -> Counter[str]:
    """Survey tasks by pass; parts under ``part``."""
    return Counter(label.rsplit(", ", 1)[1] if label.startswith("survey of") else "part" for label in labels)


def test_passes_follow_one_another_and_all_parts_follow_them(bench: Bench, tmp_path: Path) -> None:
    expected = write(tmp_path, crowded=True)
    job = submit(bench, tmp_path)
    bench.run(job)
    assert_done(bench, job, tmp_path, expected)
    price = bench.jobs.get(job).price
    assert price is not None
    each = price["survey_tasks"] // 3
    assert each > 1
    kinds = [kind for label in bench.driver.labels for kind in passes([label])]
    wanted = [f"pass {number} of 3" for number in (1, 2, 3) for _ in range(each)] + ["part"] * price["parts"]
    assert kinds == wanted
    assert bench.driver.labels[0] == "survey of u and 1 more, pass 1 of 3"


def test_a_pass_that_is_not_needed_is_left_out_and_counts_as_done(bench: Bench, tmp_path: Path) -> None:
    expected = write(tmp_path, crowded=False)
    job = submit(bench, tmp_path)
    bench.run(job)
    assert_done(bench, job, tmp_path, expected)
    assert set(passes(bench.driver.labels)) == {"pass 1 of 3", "pass 2 of 3", "part"}
    status = bench.jobs.status(job)
    price = status.record.price
    assert price is not None
    assert (status.surveys_done, status.record.surveys_total) == (3, 3)
    assert status.bytes_read == 3 * price["input_bytes"] < price["bytes_read"] == 4 * price["input_bytes"]


@pytest.mark.parametrize("crowded", [True, False])
def test_a_resumed_job_repeats_no_pass_that_was_done(bench: Bench, tmp_path: Path, crowded: bool) -> None:
    expected = write(tmp_path / "models", crowded)
    job = submit(bench, tmp_path / "models")
    steps = Steps()
    bench.run(job, steps)
    once = passes(bench.driver.labels)
    recorded = [number for number, name in enumerate(steps.names) if name == "record_survey"]
    assert len(recorded) == 3
    for order, number in enumerate((*recorded, recorded[-1] + 1)):
        root = tmp_path / f"killed{order}"
        root.mkdir()
        for name in ("base", "tuned"):
            (root / name).symlink_to(tmp_path / "models" / name)
        job = submit(bench, root)
        bench.driver.labels.clear()
        bench.run_until(job, number)  # the pass is done but not recorded, the passes before are
        before = passes(bench.driver.labels)
        bench.driver.labels.clear()
        bench.run(job)
        after = passes(bench.driver.labels)
        assert_done(bench, job, root, expected)
        kept = [f"pass {pass_} of 3" for pass_ in range(1, order + 1)]
        assert all(before[name] == once[name] and name not in after for name in kept)
        again = f"pass {order + 1} of 3"
        if order < 3 and again in once:
            assert before[again] == after[again] == once[again]
        assert after["part"] == once["part"]  # none was recorded yet


def test_a_pass_that_was_under_way_begins_anew_as_a_whole(bench: Bench, tmp_path: Path) -> None:
    expected = write(tmp_path, crowded=True)
    job = submit(bench, tmp_path)
    submitted = bench.driver.submit
    bench.driver.submit = stop_at("pass 2 of 3", 2, submitted)  # type: ignore[method-assign]
    with pytest.raises(StoppedError):
        bench.run(job)
    before = passes(bench.driver.labels)
    bench.driver.labels.clear()
    bench.driver.submit = submitted  # type: ignore[method-assign]
    bench.run(job)
    assert_done(bench, job, tmp_path, expected)
    after = passes(bench.driver.labels)
    assert before["pass 2 of 3"] == 1
    assert "pass 1 of 3" not in after
    assert after["pass 2 of 3"] == after["pass 3 of 3"] == before["pass 1 of 3"]


class StoppedError(BaseException):
    """The process ends here. No handler for errors sees it."""


def stop_at(kind: str, count: int, submit: Any) -> Any:
    """``submit``, that ends the process at the ``count``-th task of a kind."""
    seen: list[str] = []

    def stopping(request: Any) -> Any:
        seen.extend(passes([request.label]))
        if seen.count(kind) == count:
            raise StoppedError
        return submit(request)

    return stopping
