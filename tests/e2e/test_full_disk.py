"""A directory whose disk fills up: the job fails, says so, and leaves nothing, at whatever write that comes."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from service.jobs.record import JobRecord, JobState
from tests.e2e.bench import Bench
from tests.e2e.means import is_mean, submit

pytestmark = pytest.mark.valkey

ADVICE = re.compile("No space left on device; (free some space or )?choose another (output|place)")


class Disk:
    """The disk below a directory: from some write on it has no room for another."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, below: Path) -> None:
        self.writes = 0
        """How often something was to be written."""
        self.room_for = 1 << 30
        """How many of these there is room for."""
        self._below = str(below)
        for name in ("pwrite", "posix_fallocate", "mkdir", "link"):
            monkeypatch.setattr(os, name, self._watched(getattr(os, name)))
        make = os.open

        def open_file(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if flags & os.O_CREAT:
                self._write(path)
            return make(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", open_file)

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def write(place: Any, *args: Any, **kwargs: Any) -> Any:
            self._write(place)
            return call(place, *args, **kwargs)

        return write

    def _write(self, place: Any) -> None:
        path = f"/proc/self/fd/{place}" if isinstance(place, int) else os.fspath(place)
        if not os.path.realpath(path).startswith(self._below):
            return
        self.writes += 1
        if self.writes > self.room_for:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))


def detail(record: JobRecord) -> str:
    assert record.state == JobState.FAILED
    assert record.error is not None
    return str(record.error["detail"])


def test_a_disk_that_is_full_at_any_write_fails_the_job_and_is_left_clean(
    bench: Bench, base: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, tmp_path / "out")
    assert bench.run(submit(bench, tmp_path)).state == JobState.SUCCEEDED
    writes = disk.writes
    assert writes > 30
    for room in range(0, writes, 3):
        out = tmp_path / f"out-{room}"
        disk.writes, disk.room_for = 0, room
        record = bench.run(submit(bench, tmp_path, out.name))
        assert ADVICE.search(detail(record)), room
        assert str(out) in detail(record), room
        assert not out.exists(), room
        disk.room_for = 1 << 30
    assert bench.run(submit(bench, tmp_path, out.name)).state == JobState.SUCCEEDED
    assert is_mean(tmp_path, out.name)
