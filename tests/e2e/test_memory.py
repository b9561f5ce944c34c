"""Measured peak ≤ priced peak ≤ budget, with workers that cannot have more than the budget.

The model is many times larger than the budget, and so is one single tensor of it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from service.cluster.driver import Driver
from service.cluster.fleet_process import FleetSettings
from service.planning.price import BASELINE_BYTES
from tests.servers.service import running_service

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

MIB = 1 << 20
BUDGET = BASELINE_BYTES + 130 * MIB
COLUMNS = 2048
PATTERN_ROWS = 4096  # of random numbers, 16 MiB; the tensor repeats them
REPEATS = BUDGET // (PATTERN_ROWS * COLUMNS * 2) + 2
NAME = "model.embed_tokens.weight"
ZEROS = 2
"""More tensors as big, of zeros."""
LIMITS = Path(__file__).parent.parent / "servers" / "limits"
DENSITY = 0.3


def write_repeated(path: Path, pattern: torch.Tensor) -> None:
    """A checkpoint of one tensor that repeats ``pattern``, and of zeros that take no disk; never held whole."""
    path.mkdir()
    data = pattern.view(torch.int16).numpy().tobytes()
    size = len(data) * REPEATS
    assert size > BUDGET
    shape = [PATTERN_ROWS * REPEATS, COLUMNS]
    names = [NAME, *(f"model.layers.{number}.mlp.up_proj.weight" for number in range(ZEROS))]
    header = json.dumps(
        {
            name: {"dtype": "BF16", "shape": shape, "data_offsets": [number * size, (number + 1) * size]}
            for number, name in enumerate(names)
        }
    ).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(REPEATS):
            file.write(data)
        file.truncate(8 + len(header) + len(names) * size)


def expected_pattern(base: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """TIES of one model: what is among the ``DENSITY`` of the largest changes is the fine-tune's, else the base's."""
    change = np.abs(one.double().numpy() - base.double().numpy()).ravel()
    kept = DENSITY * change.size * REPEATS // 1
    ordered = np.sort(change)[::-1]
    threshold = ordered[int(np.ceil(kept / REPEATS)) - 1]
    kept_here = torch.from_numpy((change >= threshold).reshape(base.shape))
    return torch.where(kept_here, one, base)


@pytest.fixture
def limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every Ray worker that starts meanwhile can have no more memory than the budget; where they note how."""
    notes = tmp_path / "limits"
    notes.mkdir()
    monkeypatch.setenv("MERGEMILL_TEST_LIMITS", f"{notes}:{BUDGET}")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(LIMITS), *filter(None, [os.environ.get("PYTHONPATH")])])
    )
    yield notes
    for note in notes.iterdir():
        group = Path(note.read_text())
        if group.is_dir():
            deadline = time.monotonic() + 20
            while (group / "cgroup.procs").read_text():
                assert time.monotonic() < deadline, f"{group} still has processes"
                time.sleep(0.05)
            group.rmdir()


def test_a_tensor_bigger_than_the_budget(valkey_url: str, limited: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(PATTERN_ROWS, COLUMNS, generator=generator) * 0.02).bfloat16()
    noise = torch.randn(PATTERN_ROWS, COLUMNS, generator=generator) * 0.002
    one = (base.float() + noise).bfloat16()
    write_repeated(tmp_path / "base", base)
    write_repeated(tmp_path / "one", one)
    recipe = {
        "merge_method": "ties",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "one")}],
        "parameters": {"density": DENSITY},
    }
    out = tmp_path / "out"
    try:
        with (
            # Workers that have done nothing else: their peak is of their whole life.
            Driver(FleetSettings(address="local", num_cpus=2, memory_bytes=2 * BUDGET)) as driver,
            running_service(valkey_url, driver, worker_memory_bytes=BUDGET) as service,
        ):
            done = service.merge(recipe, str(out))
            peaks = [result.peak_bytes for result in service.parts(done["id"]).values()]
            how = [note.read_text() for note in limited.iterdir()]
        price = done["price"]
        assert how
        assert driver.retries == 0  # nobody was killed for it and replaced
        assert price["surveyed_tensors"] == 1 + ZEROS
        assert price["input_bytes"] > 6 * BUDGET
        assert price["most_reads"] > 1
        assert len(peaks) == price["parts"] > BUDGET // (64 * MIB)
        assert min(peaks) > BASELINE_BYTES // 2
        assert max(peaks) <= price["peak_bytes"] <= BUDGET, f"{max(peaks) / MIB:.0f} MiB"
        wanted = expected_pattern(base, one)
        with safe_open(out / "model-00001-of-00001.safetensors", framework="pt") as opened:
            merged = opened.get_slice(NAME)
            assert merged.get_shape() == [PATTERN_ROWS * REPEATS, COLUMNS]
            for repeat in (0, 1, REPEATS // 2, REPEATS - 1):
                first = repeat * PATTERN_ROWS
                assert torch.equal(merged[first : first + PATTERN_ROWS], wanted)
        assert not torch.equal(wanted, one)
        assert not torch.equal(wanted, base)
    finally:
        for path in (tmp_path / "base", tmp_path / "one", out):
            shutil.rmtree(path, ignore_errors=True)
