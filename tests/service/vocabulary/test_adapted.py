"""Vocabularies of models under adapters of embeddings and heads: rows are gathered of what comes out of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.adapters import PREFIX, write_adapter
from tests.checkpoints import read_checkpoint
from tests.oracle.ours import merge_in_process
from tests.service.vocabulary.models import EMBEDDING, HEAD, ONE, TWO, write_model

pytestmark = pytest.mark.fast


def adapter(place: Path, model: Path) -> Path:
    """One that changes the embedding and the head, by 1/4 and its multiples, so that sums are exact."""
    generator = torch.Generator().manual_seed(3)
    tensors = read_checkpoint(model)

    def factor(*shape: int) -> torch.Tensor:
        return torch.randint(-4, 5, shape, generator=generator) / 4

    rows, width = tensors[EMBEDDING].shape
    factors = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": factor(2, rows),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": factor(width, 2),
        f"{PREFIX}lm_head.lora_A.weight": factor(2, width),
        f"{PREFIX}lm_head.lora_B.weight": factor(rows, 2),
    }
    return write_adapter(place, factors, r=2, lora_alpha=2, target_modules=["embed_tokens", "lm_head"])


@pytest.mark.parametrize("source", ["union", "base", "second"])
@pytest.mark.parametrize("base", ["plain", "adapted"])
def test_an_adapted_embedding_is_gathered_as_if_it_had_been_merged_first(
    source: str, base: str, tmp_path: Path
) -> None:
    one, two = write_model(tmp_path / "one", 1, ONE), write_model(tmp_path / "two", 2, TWO)
    lora, merged = adapter(tmp_path / "lora", two), tmp_path / "merged"
    merge_in_process({merged: {"merge_method": "passthrough", "models": [{"model": f"{two}+{lora}"}]}})
    assert (read_checkpoint(merged)[HEAD] != read_checkpoint(two)[HEAD]).any()

    def recipe(adapted: str) -> dict[str, Any]:
        models = [{"model": str(one), "parameters": {"weight": 0.5}}]
        models.append({"model": adapted, "parameters": {"weight": 2.0}})
        return {
            "merge_method": "task_arithmetic",
            "base_model": str(one) if base == "plain" else adapted,
            "models": models,
            "tokenizer_source": adapted if source == "second" else source,
            "dtype": "float32",
        }

    merge_in_process({tmp_path / "hand": recipe(str(merged)), tmp_path / "ours": recipe(f"{two}+{lora}")})
    hand, ours = read_checkpoint(tmp_path / "hand"), read_checkpoint(tmp_path / "ours")
    assert hand.keys() == ours.keys()
    for name, tensor in hand.items():
        assert torch.equal(tensor, ours[name]), name
