"""The demo's checkpoints are what Hugging Face's are: shards, an index that names every tensor, a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from demo.checkpoints import INDEX, read_checkpoint, write_checkpoint

pytestmark = pytest.mark.fast


def test_a_shard_a_layer_and_the_same_back(tmp_path: Path) -> None:
    tensors = {
        "input.weight": torch.arange(6.0).view(2, 3),
        "input.bias": torch.ones(2),
        "output.weight": torch.zeros(1, 2),
    }
    write_checkpoint(tmp_path / "model", tensors, {"model_type": "toy"})
    found = read_checkpoint(tmp_path / "model")
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4 * (6 + 2 + 2)}
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert index["weight_map"] == {"input.weight": first, "input.bias": first, "output.weight": second}
    with safe_open(tmp_path / "model" / first, framework="pt") as opened:
        assert (set(opened.keys()), opened.metadata()) == ({"input.weight", "input.bias"}, {"format": "pt"})
    assert json.loads((tmp_path / "model" / "config.json").read_text()) == {"model_type": "toy"}
