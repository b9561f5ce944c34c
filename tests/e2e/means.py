"""The merge that the tests of recovery break: the mean of what the fixture ``base`` writes, in two shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints import read_checkpoint
from tests.e2e.bench import Bench

SHARD_BYTES = 90_000
"""Makes two shards of it."""


def recipe(root: Path) -> dict[str, Any]:
    """The mean of the two."""
    return {"merge_method": "linear", "models": [{"model": str(root / name)} for name in ("one", "base")]}


def submit(bench: Bench, root: Path, out: str = "out", **options: Any) -> str:
    """Queue the merge."""
    return bench.submit(recipe(root), root / out, shard_bytes=SHARD_BYTES, **options)


def is_mean(root: Path, out: str = "out") -> bool:
    """Whether the output is the mean of what the inputs are now, and nothing else is there."""
    one, base, merged = (read_checkpoint(root / name) for name in ("one", "base", out))
    return not (root / out / ".mergemill").exists() and all(
        torch.equal(merged[name], (one[name] + base[name]) / 2) for name in base
    )


def nothing_at(out: Path) -> bool:
    """Whether an output holds nothing at all."""
    return not out.exists() or not any(out.iterdir())
