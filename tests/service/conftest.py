"""What tests of the service's modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import llama_config, write_checkpoint
from tests.service.models_on_disk import LLAMA


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint in one file, with a tokenizer."""
    return write_checkpoint(
        tmp_path / "model", LLAMA, llama_config(1, 16, 2, 32), extra_files={"tokenizer.json": "{}"}
    )


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same tensors in several files, without."""
    return write_checkpoint(tmp_path / "sharded", LLAMA, llama_config(1, 16, 2, 32), shard_bytes=4096)
