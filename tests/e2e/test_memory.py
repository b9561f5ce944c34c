"""Measured peak ≤ priced peak ≤ budget, where the inputs, and one single tensor of them, are bigger than the budget."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from service.driver import Driver
from service.fleet_process import FleetSettings
from service.price import BASELINE_BYTES
from tests.servers.service import running_service

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

MIB = 1 << 20
BUDGET = BASELINE_BYTES + 130 * MIB
COLUMNS = 2048
PATTERN_ROWS = 4096  # of random numbers, 16 MiB; the tensor repeats them
REPEATS = BUDGET // (PATTERN_ROWS * COLUMNS * 2) + 2
NAME = "model.embed_tokens.weight"
DENSITY = 0.3


def write_repeated(path: Path, pattern: torch.Tensor) -> None:
    """A checkpoint of one tensor that repeats ``pattern``, without ever holding it whole."""
    path.mkdir()
    data = pattern.view(torch.int16).numpy().tobytes()
    size = len(data) * REPEATS
    assert size > BUDGET
    entry = {"dtype": "BF16", "shape": [PATTERN_ROWS * REPEATS, COLUMNS], "data_offsets": [0, size]}
    header = json.dumps({NAME: entry}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(REPEATS):
            file.write(data)


def expected_pattern(base: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """TIES of one model: what is among the ``DENSITY`` of the largest changes is the fine-tune's, else the base's."""
    change = np.abs(one.double().numpy() - base.double().numpy()).ravel()
    kept = DENSITY * change.size * REPEATS // 1
    ordered = np.sort(change)[::-1]
    threshold = ordered[int(np.ceil(kept / REPEATS)) - 1]
    kept_here = torch.from_numpy((change >= threshold).reshape(base.shape))
    return torch.where(kept_here, one, base)


def test_a_tensor_bigger_than_the_budget(valkey_url: str, tmp_path: Path) -> None:
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
        price = done["price"]
        assert price["surveyed_tensors"] == 1
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
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
