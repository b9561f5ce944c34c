"""The merge that the tests of the protocol break, and what may lie where it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import llama_tensors, write_checkpoint

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 90_000


def recipe(models: Path, method: str = "linear") -> dict[str, Any]:
    """A merge of the two."""
    found: dict[str, Any] = {"merge_method": method, "models": [{"model": str(models / "one")}]}
    if method == "linear":
        found["models"].append({"model": str(models / "base")})
    else:
        found["base_model"] = str(models / "base")
    return found


def content(directory: Path) -> dict[str, bytes]:
    """Everything below a directory."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def same_layout(out: Path) -> None:
    """A checkpoint whose index is the same text as the merged one's."""
    old = llama_tensors(9, layers=1, hidden=48, heads=2, vocab=64, dtype=torch.float32)
    order = sorted(old)
    write_checkpoint(out, {name: old[name] for name in order}, {"old": True}, shard_bytes=SHARD_BYTES)
    (out / INDEX).write_text((out / INDEX).read_text() + "\n")


def single_file(out: Path) -> None:
    """A checkpoint of one file."""
    write_checkpoint(out, llama_tensors(9, layers=1, hidden=16, heads=2, vocab=64), {"old": True})


def more_shards(out: Path) -> None:
    """A checkpoint with more shards than the merged one has."""
    old = llama_tensors(9, layers=2, hidden=48, heads=2, vocab=64)
    write_checkpoint(out, old, {"old": True}, shard_bytes=20_000)


PREPARATIONS = {"empty": None, "single file": single_file, "more shards": more_shards, "same": same_layout}
