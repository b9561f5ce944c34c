"""A small Llama in directories, and plans of merges of such directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from service.planning.plan import PlanOptions
from service.planning.planner import Planned, plan_recipe
from service.recipe import parse_recipe
from tests.checkpoints import llama_tensors
from workers.store.local import LocalStore

LLAMA = llama_tensors(layers=1, hidden=16, heads=2, vocab=32)
"""What the fixtures ``model`` and ``sharded`` hold."""


def planned(
    *directories: Path, method: str = "linear", store: LocalStore | None = None, **more: Any
) -> Planned:
    """The merge of these checkpoints, planned with memory to spare."""
    value = {"merge_method": method, "models": [{"model": str(each)} for each in directories]} | more
    return plan_recipe(
        parse_recipe(value), PlanOptions(worker_memory_bytes=1 << 40), store or LocalStore(), {}
    )


def shards_of(directory: Path) -> list[Path]:
    """The weight files of a checkpoint in several, in their order."""
    return sorted(directory.glob("model-*.safetensors"))
