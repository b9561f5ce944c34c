"""The checkpoint writer that the other tests lean on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests import checkpoints

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("shard_bytes", [None, 1, 100_000, 1 << 30])
def test_what_is_written_is_read_back(tmp_path: Path, shard_bytes: int | None) -> None:
    tensors = checkpoints.llama_tensors(dtype=torch.bfloat16) | checkpoints.edge_tensors()
    tensors |= checkpoints.integer_buffers()
    checkpoints.write_checkpoint(tmp_path, tensors, {"a": 1}, shard_bytes, {"notes.txt": "text"})
    found = checkpoints.read_checkpoint(tmp_path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shard_bytes is None:
        assert shards == ["model.safetensors"]
    else:
        index = json.loads((tmp_path / checkpoints.INDEX).read_text())
        assert sorted(set(index["weight_map"].values())) == shards
        assert shards[-1] == f"model-{len(shards):05}-of-{len(shards):05}.safetensors"
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}
    assert (tmp_path / "notes.txt").read_text() == "text"


def test_shards_stay_under_their_size(tmp_path: Path) -> None:
    checkpoints.write_checkpoint(tmp_path, checkpoints.llama_tensors(hidden=32), shard_bytes=40_000)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(sizes) > 2
    assert max(sizes) < 40_000 + 4_000  # the header


def test_a_tied_llama_has_no_head() -> None:
    untied, tied = (checkpoints.llama_tensors(tied=value) for value in (False, True))
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


def test_fine_tuning_is_seeded_and_of_its_scale() -> None:
    base = checkpoints.llama_tensors() | checkpoints.integer_buffers()
    one, same, other = (checkpoints.fine_tune(base, seed, 1e-2) for seed in (1, 1, 2))
    name = "model.embed_tokens.weight"
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])
    assert (one[name] - base[name]).std().item() == pytest.approx(1e-2, rel=0.05)
    assert torch.equal(one["buffer.position_ids"], base["buffer.position_ids"])
