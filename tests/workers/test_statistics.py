"""Merges that know each model's Fisher or Gram matrices, from a recipe to the shards, and the memory that they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from service.planning.plan import PlanOptions
from service.planning.planner import Planned
from tests.checkpoints import Tensors, read_checkpoint
from tests.workers.execute import MIB, Done, plan, run, write_models
from tests.workers.merges import assert_digests, opened
from tests.workers.methods.expected import trimmed
from tests.workers.methods.test_statistics import disjoint, mean, regression
from tests.workers.methods.test_survey_memory import check, part_tasks
from workers.errors import NonFiniteError
from workers.task import MergePiece

SPLIT = PlanOptions(part_bytes=5 * MIB, whole_tensor_bytes=5 * MIB, worker_memory_bytes=1 << 40)
"""Options that cut a big tensor."""

LONG = 3 << 20
WEIGHTS = [0.5, 2.0]


def drawn(seed: int, *shape: int, squared: bool = False) -> torch.Tensor:
    """Numbers in bfloat16; squared, a fifth of them zero."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator)
    if squared:
        found = 1e-4 * found**2 * (torch.rand(shape, generator=generator) > 0.2)
    return found.to(torch.bfloat16)


def gram(seed: int, width: int) -> torch.Tensor:
    inputs = drawn(seed, width + 50, width).float()
    return inputs.T @ inputs / 64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("known")
    found: dict[str, Tensors] = {}
    for seed, name in enumerate(["base", "a", "b"]):
        found[name] = {
            "long": drawn(seed, LONG),
            "norm": drawn(10 + seed, 97),
            "linear.weight": drawn(20 + seed, 64, 97),
        }
        found[f"fisher-{name}"] = {
            key: drawn(30 + seed, *tensor.shape, squared=True) for key, tensor in found[name].items()
        }
        found[f"gram-{name}"] = {"linear.weight": gram(40 + seed, 97)}
    write_models(root, found)
    return root


def planned(root: Path, method: str, parameters: dict[str, Any] | None = None, **more: Any) -> Planned:
    key = "gram" if method == "regmean" else "fisher"
    listed = [
        {"model": str(root / name), key: str(root / f"{key}-{name}"), "parameters": {"weight": weight}}
        for name, weight in zip("ab", WEIGHTS, strict=True)
    ]
    more = {"out_dtype": "float32", "models": listed} | more
    return plan(root, method, [], parameters or {}, SPLIT, **more)


def vectors(root: Path, *names: str) -> dict[str, list[Any]]:
    """Every tensor of these checkpoints, flat and in float64."""
    read = [read_checkpoint(root / name) for name in names]
    return {
        key: [each[key].double().numpy().reshape(-1) for each in read] for key in read[0] if key in read[-1]
    }


def merged(done: Done) -> dict[str, Any]:
    assert_digests(done)
    return {name: tensor.double().numpy() for name, tensor in opened(done).items()}


def test_fisher_from_a_recipe_to_shards(models: Path, tmp_path: Path) -> None:
    found = planned(models, "fisher")
    assert len(found.plan.parts) > 1
    tensors = merged(run(found, tmp_path / "out", order=1))
    thetas, known = vectors(models, "a", "b"), vectors(models, "fisher-a", "fisher-b")
    for name, values in tensors.items():
        wanted = mean(thetas[name], WEIGHTS, known[name])
        np.testing.assert_allclose(values.reshape(-1), wanted, rtol=0, atol=4e-6)


def test_fisher_ties_from_a_recipe_to_shards(models: Path, tmp_path: Path) -> None:
    found = planned(models, "fisher_ties", {"density": 0.4, "lambda": 0.5})
    assert found.plan.surveys
    tensors = merged(run(found, tmp_path / "out", order=2))
    every, known = vectors(models, "base", "a", "b"), vectors(models, "fisher-a", "fisher-b")
    some = slice(0, 4000)
    for name, values in tensors.items():
        base, *thetas = every[name]
        taus = [trimmed((theta - base).astype(np.float32), 0.4)[some] for theta in thetas]
        wanted = base[some] + 0.5 * disjoint(taus, WEIGHTS, [fisher[some] for fisher in known[name]])
        np.testing.assert_allclose(values.reshape(-1)[some], wanted, rtol=0, atol=4e-6)


def test_regmean_from_a_recipe_to_shards(models: Path, tmp_path: Path) -> None:
    found = planned(models, "regmean", {"alpha": 0.8})
    tensors = merged(run(found, tmp_path / "out", order=3))
    thetas, grams = vectors(models, "a", "b"), vectors(models, "gram-a", "gram-b")["linear.weight"]
    matrices = [theta.reshape(64, 97) for theta in thetas["linear.weight"]]
    wanted = regression(matrices, [each.reshape(97, 97) for each in grams], WEIGHTS, 0.8)
    np.testing.assert_allclose(tensors["linear.weight"], wanted, rtol=0, atol=4e-6)
    for name in ("long", "norm"):
        plain = sum(w * theta for w, theta in zip(WEIGHTS, thetas[name], strict=True)) / sum(WEIGHTS)
        np.testing.assert_allclose(tensors[name], plain, rtol=0, atol=4e-6)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_that_are_no_numbers_are_told_by_their_own_names(
    models: Path, tmp_path: Path, method: str
) -> None:
    key, name = ("gram", "linear.weight") if method == "regmean" else ("fisher", "norm")
    hurt = {"a": models / "a", "b": models / "b", f"{key}-a": models / f"{key}-a"}
    for link, place in hurt.items():
        (tmp_path / link).symlink_to(place)
    (tmp_path / "base").symlink_to(models / "base")
    bad = vectors(models, f"{key}-b", f"{key}-b")
    shapes = {"linear.weight": (97, 97) if key == "gram" else (64, 97), "norm": (97,), "long": (LONG,)}
    tensors = {each: torch.tensor(two[0]).float().reshape(shapes[each]) for each, two in bad.items()}
    tensors[name].reshape(-1)[5] = float("nan")
    write_models(tmp_path, {f"{key}-b": tensors})
    with pytest.raises(NonFiniteError, match=f"tensor '{name}' of .*/{key}-b holds 1 NaN or Inf"):
        run(planned(tmp_path, method), tmp_path / "out")


def test_regmean_takes_no_more_than_its_price(tmp_path: Path) -> None:
    """With as many inputs as outputs, with more and with fewer, of full rank and of none to speak of."""
    tasks = []
    cases = [(700, 700, 0.9), (16, 900, 1.0), (5000, 60, 0.9), (5000, 60, 1.0)]
    for number, (outputs, inputs, alpha) in enumerate(cases):
        root = tmp_path / str(number)
        found: dict[str, Tensors] = {}
        for name in ("base", "a", "b"):
            found[name] = {"w": drawn(number, outputs, inputs)}
            few = drawn(50 + number, 40, inputs).float()
            found[f"gram-{name}"] = {"w": few.T @ few}
        write_models(root, found)
        made = planned(root, "regmean", {"alpha": alpha}).plan
        pieces = [piece for part in made.parts for piece in part.pieces if isinstance(piece, MergePiece)]
        assert [piece.arithmetic.method for piece in pieces] == ["regmean"]
        tasks += part_tasks(tmp_path, f"out-{number}", made)
    check(tasks, tmp_path)
