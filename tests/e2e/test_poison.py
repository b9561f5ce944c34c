"""Parts that no worker survives: they fail their job, by name, and no other."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from service.cluster.dispatch import Dispatcher, Need, Node
from service.cluster.driver import TaskRequest
from service.jobs.record import JobState
from tests.e2e.bench import Bench, LocalDriver
from tests.e2e.means import is_mean, nothing_at, submit
from workers.errors import FleetError
from workers.run import PartRun

pytestmark = pytest.mark.valkey

POISON = "model.norm.weight"


class Dying(LocalDriver):
    """A cluster whose workers die of the part with the poison, as :mod:`service.cluster.fleet` sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.deaths = 0

    def submit(self, request: TaskRequest) -> Future[Any]:
        """Run a task, as often as it is given another try."""
        if POISON not in str(request.payload):
            return super().submit(request)
        dispatcher = Dispatcher()
        dispatcher.set_nodes([Node(1, 0, 1 << 40)])
        dispatcher.add(0, Need(request.memory_bytes, 1, 0, request.label, request.stream))
        future: Future[Any] = Future()
        while not future.done():
            (batch,) = dispatcher.start(float(self.deaths))
            self.deaths += 1
            cause = "WorkerCrashedError: it was killed by SIGSEGV"
            ((_, why),) = dispatcher.crashed(batch.number, cause, float(self.deaths))
            if why is not None:
                future.set_exception(FleetError(why))
        return future


def test_a_part_that_kills_its_workers_fails_its_job_with_its_tensors_name(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    healthy, bench.driver = bench.driver, Dying()
    record = bench.run(submit(bench, tmp_path))
    assert record.state == JobState.FAILED
    assert record.error is not None
    assert (record.error["type"], len(str(record.error["part"]))) == ("FleetError", 32)
    detail = str(record.error["detail"])
    assert "given up after 4 tries" in detail
    assert "killed by SIGSEGV" in detail
    assert POISON in detail  # with whatever else was in its part
    assert bench.driver.deaths == 4
    assert nothing_at(tmp_path / "out")
    bench.driver = healthy
    assert bench.run(submit(bench, tmp_path)).state == JobState.SUCCEEDED
    assert is_mean(tmp_path)


def test_a_defect_that_one_tensor_brings_up_fails_its_job_with_that_name(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = PartRun._merge

    def broken(self: PartRun, piece: Any, target: memoryview) -> None:
        if piece.name == POISON:
            raise RuntimeError("the kernel does not like it")
        merge(self, piece, target)

    monkeypatch.setattr(PartRun, "_merge", broken)
    record = bench.run(submit(bench, tmp_path))
    assert record.state == JobState.FAILED
    assert record.error is not None
    detail = str(record.error["detail"])
    assert "the kernel does not like it" in detail
    assert f"the tensor {POISON}" in detail
    assert any(detail.startswith(name) for name in base), "it does not begin with the part's tensors"
    assert "part" in record.error
    assert nothing_at(tmp_path / "out")
    monkeypatch.undo()
    assert bench.run(submit(bench, tmp_path)).state == JobState.SUCCEEDED
