"""The commands behind the decision notes run, measure what they say, and leave nothing behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import memory, store_bytes
from workers.store import direct

MIB = 1 << 20


def said_by(code: str) -> Any:
    """What a program in a process of its own prints, which is JSON."""
    return json.loads(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def test_files_are_written_in_every_way_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    past: list[tuple[int, int]] = []
    write_pages = direct._write_pages

    def noted(path: Path, offset: int, view: memoryview) -> int:
        past.append((offset, len(view)))
        return write_pages(path, offset, view)

    monkeypatch.setattr(direct, "_write_pages", noted)
    with contextlib.ExitStack() as stack:
        cases = store_bytes.file_cases(stack, argparse.Namespace(directory=tmp_path, mib=12, parts=[6]))
        store_bytes.measure(cases, 12 * MIB, rounds=1)
    # Whole parts, by the two ways that write directly and no other: the buffer lies as the file does
    assert past == [(0, 6 * MIB), (6 * MIB, 6 * MIB)] * 2
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row[: len(name)] for row, name in zip(rows, cases, strict=True)] == list(cases)
    assert list(tmp_path.iterdir()) == []


def test_memory_in_use_faults_less_than_fresh_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.touch(tmp_path, 16 * MIB, rounds=2)
    rows = [line.rsplit(maxsplit=3) for line in capsys.readouterr().out.splitlines()[1:]]
    faults = {(name, int(number)): int(count.replace(",", "")) for name, number, _, count in rows}
    assert len(faults) == 2 * 4
    assert faults["fresh", 2] >= 16 * MIB // (2 * MIB)  # were all its pages huge ones
    assert faults["an arena in use", 2] < faults["fresh", 2]
    assert list(tmp_path.iterdir()) == []


def test_a_worker_grows_step_by_step() -> None:
    found = said_by("import json; from benchmarks.baseline import stages; print(json.dumps(stages(None)))")
    peaks = [peak for _, peak, _, _ in found]
    assert peaks == sorted(peaks)
    assert peaks[0] < 64 * MIB < 128 * MIB < peaks[-1]
    assert found[-1][0] == "S3 client"


def test_a_kept_arena_of_the_job_before_is_not_in_a_workers_peak() -> None:
    """Which is what the benchmark compares with this job's price."""
    before, after = said_by(
        "import json\n"
        "from workers.entry import _ARENA\n"
        "from workers.run import peak_bytes\n"
        "def fill(nbytes):\n"
        "    with _ARENA.of(nbytes, 'cpu') as arena:\n"
        "        (extent,) = arena.take([nbytes])\n"
        "        extent.view[:] = bytes(nbytes)\n"
        "        arena.give_back(extent)\n"
        "    return peak_bytes()\n"
        f"print(json.dumps([fill({300 * MIB}), fill({20 * MIB})]))"
    )
    assert after < before - 200 * MIB
