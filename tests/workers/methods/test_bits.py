"""The same bits from every instruction set and thread count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.workers.methods.cases import CASES

ROOT = Path(__file__).parents[3]


def digests(capability: str | None) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that spins starves the other on a busy machine
    if capability is not None:
        environment["ATEN_CPU_CAPABILITY"] = capability
    run = subprocess.run(
        [sys.executable, "-m", "tests.workers.methods.bits"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_instruction_sets_and_threads_give_the_same_bits() -> None:
    runs = [digests(capability) for capability in ("default", "avx2", None)]
    assert runs[0]["capability"] == "DEFAULT"
    assert runs[-1]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert set(runs[0]["one"]) == set(CASES)
    for run in runs:
        assert run["one"] == runs[0]["one"]
        assert run["two"] == runs[0]["one"]
