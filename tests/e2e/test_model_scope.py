"""`profile: paper` from a recipe to a checkpoint: TIES as its authors run it, over the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.checkpoints import fine_tune, llama_config, llama_tensors, read_checkpoint, write_checkpoint
from tests.servers.service import RunningService
from tests.workers.methods.expected import authors_ties

pytestmark = [pytest.mark.valkey, pytest.mark.ray]

MIB = 1 << 20
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of 14 MB in bfloat16 with a tied head that is stored all the same; one in shards."""
    root = tmp_path_factory.mktemp("models")
    shape: dict[str, Any] = {"layers": 2, "hidden": 256, "heads": 4, "vocab": 12_000, "tied": True}
    base = llama_tensors(0, dtype=torch.bfloat16, **shape)
    config = llama_config(**shape)
    for name, tensors, cut in [
        ("base", base, None),
        ("one", fine_tune(base, 1, 0.01), 3 * MIB),
        ("two", fine_tune(base, 2, 0.003), None),
    ]:
        write_checkpoint(root / name, tensors | {HEAD: tensors[EMBEDDING].clone()}, config, cut)
    return root


def recipe(root: Path, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "profile": "paper",
        "base_model": f"{root}/base",
        "models": [{"model": f"{root}/one"}, {"model": f"{root}/two"}],
        "parameters": {"density": 0.2, **parameters},
        "dtype": "float32",
    }


def test_the_paper_profile_gives_what_the_authors_code_gives(
    service: RunningService, models: Path, tmp_path: Path
) -> None:
    base, one, two = (read_checkpoint(models / name) for name in ("base", "one", "two"))
    counted = [name for name in base if name != HEAD]
    taus = [
        {name: (model[name].float() - base[name].float()).double().numpy() for name in counted}
        for model in (one, two)
    ]
    nothing = {name: np.zeros(tuple(base[name].shape)) for name in counted}
    moved = authors_ties(nothing, taus, 0.2, 0.8)
    digests = []
    for options in ({}, {"part_bytes": 5 * MIB, "shard_bytes": 8 * MIB}):
        done = service.merge(
            recipe(models, **{"lambda": 0.8}), str(tmp_path / f"out{len(options)}"), **options
        )
        price, progress = done["price"], done["progress"]
        assert price["most_reads"] == 4
        assert price["surveyed_tensors"] == len(counted)
        head = 3 * 2 * base[HEAD].numel()
        counted_bytes = price["input_bytes"] - head
        assert price["bytes_read"] == 4 * counted_bytes + head
        assert progress["bytes_read"] in (price["bytes_read"], price["bytes_read"] - counted_bytes)
        merged = read_checkpoint(tmp_path / f"out{len(options)}")
        assert sorted(merged) == sorted(base)
        for name in counted:
            expected = base[name].double().numpy() + moved[name]
            np.testing.assert_allclose(merged[name].double().numpy(), expected, rtol=3e-7, atol=1e-8)
        assert torch.equal(merged[HEAD], merged[EMBEDDING])
        digests.append({name: tensor.numpy().tobytes() for name, tensor in merged.items()})
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("method", "parameters", "says"),
    [
        ("ties", {"equal_magnitudes": "exact_k"}, "equal_magnitudes 'exact_k' needs trim_scope 'tensor'"),
        (
            "dare_ties",
            {"equal_magnitudes": "exact_k"},
            "equal_magnitudes 'exact_k' needs trim_scope 'tensor'",
        ),
        ("dare_ties", {"rescale": "l1"}, "rescale 'l1' needs trim_scope 'tensor'"),
    ],
)
def test_what_has_no_meaning_over_a_whole_model_is_refused_and_says_what_has(
    service: RunningService, models: Path, method: str, parameters: dict[str, Any], says: str
) -> None:
    asked = recipe(models, **parameters) | {"merge_method": method}
    answer = service.http.post("/v1/plans", json={"recipe": asked})
    assert answer.status_code == 422
    (error,) = answer.json()["errors"]
    assert says in error
    asked = recipe(models, **parameters, trim_scope="tensor") | {"merge_method": method}
    assert service.http.post("/v1/plans", json={"recipe": asked}).status_code == 200
