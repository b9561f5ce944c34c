"""Linear, task arithmetic, SLERP and passthrough, by hand and against float64 numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.methods import expected
from workers.methods import METHODS
from workers.methods.evaluate import merge_tensor
from workers.task import SURVEY_ELEMENTS

pytestmark = pytest.mark.fast


def merge(
    name: str, models: Any, weights: list[float] | None = None, base: Any = None, **parameters: Any
) -> Any:
    method = METHODS[name]
    inputs = [torch.as_tensor(model, dtype=torch.float32) for model in models]
    each = [{}] * len(models) if weights is None else [{"weight": weight} for weight in weights]
    return merge_tensor(
        method,
        method.parameters(**parameters),
        [method.model_parameters(**values) for values in each],
        None if base is None else torch.as_tensor(base, dtype=torch.float32),
        inputs,
    )


# --- linear and task arithmetic ---------------------------------------------------------------------------


def test_linear_by_hand() -> None:
    models = [[1.0, 2.0], [3.0, -6.0]]
    assert merge("linear", models).tolist() == [2.0, -2.0]
    assert merge("linear", models, [1.0, 3.0]).tolist() == [2.5, -4.0]
    assert merge("linear", models, [1.0, 3.0], normalize=False).tolist() == [10.0, -16.0]
    assert merge("linear", models, [1.0, -1.0]).tolist() == [-2.0, 8.0]  # weights that cancel divide by 1


def test_task_arithmetic_by_hand() -> None:
    base, models = [1.0, 1.0], [[2.0, 1.0], [1.0, -1.0]]
    assert merge("task_arithmetic", models, [1.0, 0.5], base).tolist() == [2.0, 0.0]
    assert merge("task_arithmetic", models, [1.0, 0.5], base, lambda_=2.0).tolist() == [3.0, -1.0]
    assert merge("task_arithmetic", models, [1.0, 1.0], base, normalize=True).tolist() == [1.5, 0.0]
    assert merge("task_arithmetic", models, [-1.0, 0.0], base).tolist() == [0.0, 1.0]  # forgetting a task


@st.composite
def weighted(draw: st.DrawFn) -> tuple[Any, list[float]]:
    count, n = draw(st.integers(1, 16)), draw(st.integers(1, 100))
    seed = draw(st.integers(0, 2**32))
    vectors = np.random.default_rng(seed).normal(0, 0.02, (count, n)).astype(np.float32).astype(np.float64)
    return vectors, [draw(st.floats(0.1, 2)) for _ in range(count)]


@given(weighted(), st.booleans())
def test_linear_agrees_with_float64_numpy(arguments: tuple[Any, list[float]], normalize: bool) -> None:
    vectors, weights = arguments
    wanted = np.tensordot(weights, vectors, 1) / (sum(weights) if normalize else 1.0)
    merged = merge("linear", vectors, weights, normalize=normalize).numpy()
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-7)


@given(weighted(), st.booleans(), st.floats(-2, 2))
def test_task_arithmetic_agrees_with_float64_numpy(
    arguments: tuple[Any, list[float]], normalize: bool, scale: float
) -> None:
    vectors, weights = arguments
    base, models = vectors[0] * 0.5, vectors
    total = np.tensordot(weights, models - base, 1) / (sum(weights) if normalize else 1.0)
    merged = merge("task_arithmetic", models, weights, base, normalize=normalize, lambda_=scale).numpy()
    np.testing.assert_allclose(merged, base + scale * total, rtol=1e-5, atol=1e-6)


def test_models_are_added_in_order_without_fusing() -> None:
    """A fused multiply-add, or another order, would round these differently."""
    generator = np.random.default_rng(5)
    vectors = generator.normal(0, 1, (16, 1003)).astype(np.float32)
    weights = generator.normal(0, 1, 16)
    total = np.float32(weights[0]) * vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        total = (total + np.float32(weight) * vector).astype(np.float32)
    merged = merge("linear", vectors, weights.tolist(), normalize=False).numpy()
    assert (merged.view(np.int32) == total.view(np.int32)).all()


# --- slerp ------------------------------------------------------------------------------------------------


def test_slerp_by_hand() -> None:
    half = 0.5**0.5
    assert merge("slerp", [[1.0, 0.0], [0.0, 1.0]], t=0.5).tolist() == pytest.approx([half, half], rel=1e-6)
    third = merge("slerp", [[2.0, 0.0], [0.0, 1.0]], t=1 / 3).tolist()
    assert third == pytest.approx([2 * np.cos(np.pi / 6), np.sin(np.pi / 6)], rel=1e-6)


@given(st.integers(0, 2**32), st.integers(2, 60), st.floats(0, 1))
def test_slerp_agrees_with_float64_numpy(seed: int, n: int, t: float) -> None:
    a, b = np.random.default_rng(seed).normal(0, 1, (2, n)).astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(
        merge("slerp", [a, b], t=t).numpy(), expected.slerp(a, b, t), rtol=1e-5, atol=1e-6
    )


def test_slerp_is_linear_when_nearly_parallel_opposite_or_zero() -> None:
    a = np.array([1.0, 2.0, 3.0])
    for b in (a * 5, a + 1e-3, -a, np.zeros(3)):
        merged = merge("slerp", [a, b], t=0.25).numpy()
        np.testing.assert_allclose(merged, 0.75 * a + 0.25 * b, rtol=1e-6, atol=1e-7)
    assert merge("slerp", [np.zeros(3), np.zeros(3)], t=0.25).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("cosine", "linear"), [(0.9994, False), (0.9996, True), (-0.9994, False), (-0.9996, True)]
)
def test_the_threshold_of_nearly_parallel(cosine: float, linear: bool) -> None:
    a, b = np.array([1.0, 0.0]), np.array([cosine, (1 - cosine**2) ** 0.5])
    merged = merge("slerp", [a, b], t=0.5).double().numpy()
    assert (np.linalg.norm(merged) == pytest.approx(1.0, abs=1e-6)) is not linear
    assert bool(np.allclose(merged, (a + b) / 2, atol=1e-6)) is linear


def test_slerp_at_its_ends_gives_a_models_own_bits() -> None:
    a, b = torch.tensor([1.0, -0.0, 3e-45, 4.0]), torch.tensor([-0.0, 5.0, float("inf"), 1.0])
    for t, end in ((0, a), (1, b)):
        assert torch.equal(merge("slerp", [a, b], t=t).view(torch.int32), end.view(torch.int32))


def test_slerp_takes_a_long_tensor_as_one_vector() -> None:
    n = 2 * SURVEY_ELEMENTS + 9
    generator = np.random.default_rng(1)
    a, b = (generator.normal(0, sigma, n).astype(np.float32).astype(np.float64) for sigma in (0.02, 0.05))
    np.testing.assert_allclose(
        merge("slerp", [a, b], t=0.4).numpy(), expected.slerp(a, b, 0.4), rtol=1e-5, atol=1e-7
    )


def test_slerp_of_huge_and_tiny_values_neither_overflows_nor_vanishes() -> None:
    a, b = np.array([3e38, 0.0]), np.array([0.0, 3e38])
    np.testing.assert_allclose(merge("slerp", [a, b], t=0.5).numpy(), expected.slerp(a, b, 0.5), rtol=1e-6)
    a, b = np.array([1e-5, 0.0]), np.array([0.0, 1e-5])
    np.testing.assert_allclose(merge("slerp", [a, b], t=0.5).numpy(), expected.slerp(a, b, 0.5), rtol=1e-6)


# --- passthrough ------------------------------------------------------------------------------------------


def test_passthrough_gives_the_bits() -> None:
    x = torch.tensor([1.5, -0.0, float("nan"), float("-inf")])
    assert torch.equal(merge("passthrough", [x]).view(torch.int32), x.view(torch.int32))
    assert METHODS["passthrough"].copies
