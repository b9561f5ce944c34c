"""Negation (2212.04089): a task that is taken away is unlearned, and what it did not touch stays."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from service.planning.plan import PlanOptions
from service.planning.planner import plan_recipe
from service.recipe import parse_yaml
from tests.checkpoints import write_checkpoint
from tests.workers.execute import run
from tests.workers.merges import opened
from workers.store.local import LocalStore

pytestmark = pytest.mark.fast

PAGE = Path(__file__).parents[3] / "docs/methods.md"
FEATURES = 24


def task(seed: int, features: slice) -> tuple[np.ndarray, np.ndarray]:
    """Examples of a regression that look at some of the features, and what they should give."""
    generator = np.random.default_rng(seed)
    inputs = np.zeros((200, FEATURES))
    inputs[:, features] = generator.normal(size=inputs[:, features].shape)
    return inputs, inputs @ generator.normal(size=FEATURES)


def trained(start: np.ndarray, data: list[tuple[np.ndarray, np.ndarray]], steps: int) -> np.ndarray:
    """A linear model after some steps of gradient descent."""
    weights = start.copy()
    for _ in range(steps):
        weights -= 0.05 * sum(2 / len(x) * x.T @ (x @ weights - y) for x, y in data)
    return weights


def loss(weights: np.ndarray, data: tuple[np.ndarray, np.ndarray]) -> float:
    inputs, wanted = data
    return float(np.mean((inputs @ weights - wanted) ** 2))


def test_the_documented_recipe_unlearns_a_task_and_leaves_the_other_alone(tmp_path: Path) -> None:
    found = re.search(r"## Unlearning\n.*?```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    forget, keep = task(1, slice(0, 12)), task(2, slice(12, None))
    base = trained(np.zeros(FEATURES), [forget, keep], 8)
    tuned = trained(base, [forget], 60)
    assert loss(tuned, forget) < 0.1 * loss(base, forget)
    for name, weights in (("base", base), ("tuned-on-what-to-forget", tuned)):
        write_checkpoint(tmp_path / name, {"head.weight": torch.from_numpy(weights).float()})
    roots = {"org/": tmp_path.as_uri()}
    planned = plan_recipe(parse_yaml(found[1]), PlanOptions(worker_memory_bytes=1 << 40), LocalStore(), roots)
    merged = opened(run(planned, tmp_path / "out"))["head.weight"].double().numpy()
    np.testing.assert_allclose(merged, base - 0.7 * (tuned - base), atol=1e-6)
    assert loss(merged, forget) > 1.5 * loss(base, forget)
    assert loss(merged, keep) == pytest.approx(loss(base, keep), rel=1e-5)
