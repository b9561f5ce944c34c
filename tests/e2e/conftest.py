"""What the tests of whole jobs share."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import fine_tune, llama_tensors, write_checkpoint
from tests.e2e.bench import Bench


@pytest.fixture
def bench(valkey_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A runner to break.

    Nothing is synced to disk: the death of a process loses nothing that was written, and that of a machine
    is not what these tests are about.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(os, "fdatasync", lambda _: None)
    made = Bench(valkey_url, f"test-{uuid.uuid4().hex}")
    with made.jobs:
        yield made


@pytest.fixture
def base(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Tensors of the base at ``base``, with a fine-tune at ``one``: they merge into two shards."""
    tensors = llama_tensors(0, layers=1, hidden=48, heads=2, vocab=64, dtype=torch.float32)
    write_checkpoint(tmp_path / "base", tensors)
    write_checkpoint(tmp_path / "one", fine_tune(tensors, 1, 0.1))
    return tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a fine-tune, both small, that merge into two shards."""
    root = tmp_path_factory.mktemp("models")
    base = llama_tensors(0, layers=1, hidden=48, heads=2, vocab=64, dtype=torch.float32)
    write_checkpoint(root / "base", base, {"torch_dtype": "float32"}, extra_files={"tokenizer.json": "{}"})
    write_checkpoint(root / "one", fine_tune(base, 1, 0.1))
    return root
