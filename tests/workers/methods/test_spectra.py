"""Methods that decompose matrices, against numpy's decomposition and what follows from their definition."""

from __future__ import annotations

import numpy as np
import pytest

from tests.workers.methods.again import Vector
from tests.workers.methods.test_more import close, merge, normal, tuned

pytestmark = pytest.mark.fast

SHAPE = (12, 9)


def polar(x: Vector) -> Vector:
    left, _, right = np.linalg.svd(x, full_matrices=False)
    found: Vector = left @ right
    return found


def test_tsv_puts_orthogonal_singular_vectors_together() -> None:
    base = normal(0, *SHAPE)
    models = tuned(base, 3)
    lefts, values, rights = [], [], []
    for model in models:
        left, value, right = np.linalg.svd(model - base, full_matrices=False)
        lefts.append(left[:, :3])
        values.append(0.5 * value[:3])
        rights.append(right[:3])
    wanted = polar(np.concatenate(lefts, 1)) @ np.diag(np.concatenate(values)) @ polar(np.concatenate(rights))
    close(merge("tsv", base, models, [{"weight": 0.5}] * 3, **{"lambda": 0.7}), base + 0.7 * wanted, 2)


def test_tasks_that_share_no_direction_are_added_up() -> None:
    one, two = np.zeros(SHAPE), np.zeros(SHAPE)
    one[0, 0], two[1, 1] = 3, -2
    close(merge("tsv", np.zeros(SHAPE), [one, two]), one + two)
    close(merge("knots", np.zeros(SHAPE), [one, two], density=1.0), one + two)


@pytest.mark.parametrize("name", ["tsv", "knots"])
def test_of_identical_models_no_more_is_left_than_one_has(name: str) -> None:
    one = np.outer(normal(1, SHAPE[0]), normal(2, SHAPE[1]))  # of rank 1, so that TSV keeps all of it
    close(merge(name, np.zeros(SHAPE), [one, one], **({"density": 1.0} if name == "knots" else {})), one, 4)


def test_knots_merges_in_the_common_directions() -> None:
    base = normal(0, *SHAPE)
    models, densities = tuned(base, 2), [0.5, 0.25]
    left, values, right = np.linalg.svd(np.concatenate([m - base for m in models], 1), full_matrices=False)
    parts = []
    for part, density in zip(np.split(right, 2, axis=1), densities, strict=True):
        kept = int(density * part.size)
        least = np.sort(np.abs(part), axis=None)[-kept]
        parts.append(np.where(np.abs(part) >= least, part, 0))
    signs = np.where(sum(parts) >= 0, 1, -1)
    agree = [np.sign(part) == signs for part in parts]
    merged = sum(part * a for part, a in zip(parts, agree, strict=True)) / np.maximum(
        sum(map(np.int64, agree)), 1
    )
    own = [{"density": density} for density in densities]
    close(merge("knots", base, models, own), base + left @ np.diag(values) @ merged, 2)


@pytest.mark.parametrize("name", ["tsv", "knots"])
def test_vectors_have_no_singular_vectors_and_are_averaged(name: str) -> None:
    close(merge(name, [1, 1], [[3, 1], [1, 2]]), [2, 1.5])
    assert merge(name, 1.0, [2.0, 4.0]) == 3
