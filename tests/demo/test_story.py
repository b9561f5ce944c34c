"""``python -m demo`` from end to end, on an embedded stack of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

pytest.importorskip("sklearn", reason="the demo needs scikit-learn: pip install 'mergemill[demo]'")

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
MARK = "MERGEMILL_DEMO_TEST"
LIMIT_S = 110


def processes_with(value: str) -> list[str]:
    """Command lines of the processes that inherited ``MARK`` with this value."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={value}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (OSError, UnicodeDecodeError):
            continue  # it ended, or is somebody else's
    return found


@pytest.mark.timeout(LIMIT_S + 30)
def test_the_demo_prints_its_table_and_leaves_nothing_running(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    environment = {key: value for key, value in os.environ.items() if key != "MERGEMILL_URL"}
    environment |= {"PYTHONPATH": str(ROOT), "COLUMNS": "120", MARK: mark}
    done = subprocess.run(
        [sys.executable, "-m", "demo"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line
    ]
    means = {row[0]: float(row[-1]) for row in rows}
    singles = ["base", "tuned: rotated", "tuned: mirrored", "tuned: inverted"]
    assert list(means) == [*singles, "linear", "task_arithmetic", "ties", "dare_ties"]
    assert means["linear"] > max(means[name] for name in singles)
    assert "On the mean over the tasks linear" in done.stdout
    assert all(len(row) == 6 for row in rows)

    deadline = time.monotonic() + 15
    while (left := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
