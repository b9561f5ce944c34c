"""TIES against hand-worked vectors, float64 numpy, and the ties and cancellations that bfloat16 makes common."""

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

TIES: Any = METHODS["ties"]
Lists = list[list[float]]


def ties(
    base: Any,
    models: Any,
    weights: list[float] | None = None,
    densities: list[float] | None = None,
    **switches: Any,
) -> torch.Tensor:
    weights = weights or [1.0] * len(models)
    densities = densities or [1.0] * len(models)
    return merge_tensor(
        TIES,
        TIES.parameters(**switches),
        [TIES.model_parameters(weight=w, density=d) for w, d in zip(weights, densities, strict=True)],
        torch.as_tensor(base, dtype=torch.float32),
        [torch.as_tensor(model, dtype=torch.float32) for model in models],
    )


def taus(vectors: Lists, **settings: Any) -> list[float]:
    """The merged task vector of ``vectors``, over a base of zeros."""
    result: list[float] = ties([0.0] * len(vectors[0]), vectors, **settings).tolist()
    return result


# --- by hand ----------------------------------------------------------------------------------------------


def test_the_three_steps_by_hand() -> None:
    # n = 5, density 0.6 keeps 3:       [ 4, -3,  0,  2,  0]
    #                                   [-1,  0, -5,  0,  6]
    # sums elect                          +   -   -   +   +
    # agreeing means                      4  -3  -5   2   6
    models = [[4.0, -3.0, 1.0, 2.0, -0.5], [-1.0, 0.5, -5.0, 0.25, 6.0]]
    assert taus(models, densities=[0.6, 0.6]) == [4, -3, -5, 2, 6]


def test_only_agreeing_entries_are_averaged() -> None:
    assert taus([[3.0], [1.0], [-1.0]]) == [2.0]  # 3 + 1 - 1 elects +, and the mean of 3 and 1 is 2
    assert taus([[3.0], [1.0], [-5.0]]) == [-5.0]


def test_base_and_lambda() -> None:
    assert ties([10.0, 20.0], [[12.0, 20.0], [14.0, 16.0]], lambda_=0.5).tolist() == [11.5, 18.0]


def test_a_density_of_each_model() -> None:
    models = [[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.5]]
    assert taus(models, densities=[0.25, 0.5, 0.0]) == [4.0, 3.0, 0.0, 4.0]


@pytest.mark.parametrize(
    ("weights", "switches", "expect"),
    [
        ([0.3, 0.5], {}, 1.0),
        ([0.3, 0.5], {"normalize": False}, 0.8),
        ([0.3, 0.5], {"divisor": "count"}, 0.4),  # as PEFT
        ([-1.0, -1.0], {}, -1.0),
        ([-1.0, -1.0], {"divisor": "weights"}, 1.0),  # mergekit's sign flip
        ([0.0, 0.0], {}, 0.0),
    ],
)
def test_weights_of_two_equal_task_vectors(
    weights: list[float], switches: dict[str, Any], expect: float
) -> None:
    assert taus([[1.0], [1.0]], weights=weights, **switches) == pytest.approx([expect], rel=1e-6)


def test_the_election_is_weighted() -> None:
    assert taus([[1.0], [-2.0]], weights=[0.9, 0.1]) == [1.0]
    assert taus([[1.0], [-2.0]], weights=[0.5, 0.5]) == [-2.0]


def test_signed_weights_that_cancel_divide_by_one() -> None:
    # w * tau is 2 and 1: both agree with +, and the weights 1 and -1 cancel.
    assert taus([[2.0], [-1.0]], weights=[1.0, -1.0], divisor="weights") == [3.0]
    assert taus([[2.0], [-1.0]], weights=[1.0, -1.0]) == [1.5]


def test_a_zero_sum_elects_plus_or_the_majority() -> None:
    cancelling = [[1.0, -4.0, -4.0], [-1.0, -4.0, -4.0]]
    assert taus(cancelling) == [1.0, -4.0, -4.0]
    assert taus(cancelling, zero_sign="majority") == [-1.0, -4.0, -4.0]
    assert taus([[-x for x in row] for row in cancelling], zero_sign="majority") == [1.0, 4.0, 4.0]
    # Elected signs that balance, too: the authors' code then takes the negative entries.
    assert taus([[1.0, -4.0, 4.0], [-1.0, -4.0, 4.0]], zero_sign="majority") == [-1.0, -4.0, 4.0]


def test_the_majority_leaves_nonfinite_entries_out_and_keeps_their_neighbours() -> None:
    # The finite sums elect +, -, + besides the zero: with the last one uncounted they would balance.
    models = [[1.0, 2.0, -2.0, 1.0], [-1.0, 2.0, -2.0, float("nan")]]
    assert taus(models, zero_sign="majority")[:3] == [1.0, 2.0, -2.0]


def test_equal_magnitudes_stay_or_make_up_exactly_k() -> None:
    vector = [1.0, -2.0, 2.0, 3.0, 2.0, -2.0]
    assert taus([vector], densities=[0.5]) == [0.0, -2.0, 2.0, 3.0, 2.0, -2.0]
    assert taus([vector], densities=[0.5], equal_magnitudes="exact_k") == [0.0, -2.0, 2.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("rule", "density", "n", "count"),
    [
        ("exact", 0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in floats
        ("mergekit", 0.29, 100, 28),
        ("paper", 0.29, 100, 29),
        ("exact", 0.2, 10, 2),
        ("paper", 0.2, 10, 3),
        ("exact", 0.01, 10, 1),
        ("mergekit", 0.01, 10, 1),
        ("exact", 0.0, 10, 0),
        ("mergekit", 0.0, 10, 0),
        ("paper", 0.0, 10, 1),
        ("paper", 0.999, 10, 10),
        ("exact", 1.0, 10, 10),
    ],
)
def test_how_many_are_kept(rule: str, density: float, n: int, count: int) -> None:
    vector = [float(i + 1) * (-1) ** i for i in range(n)]
    merged = taus([vector], densities=[density], keep_count=rule)
    assert merged == [0.0] * (n - count) + vector[n - count :]


def test_a_scalar_tensor() -> None:
    assert ties(torch.tensor(1.0), [torch.tensor(3.0)], densities=[0.1]).item() == 3.0
    assert ties(torch.tensor(1.0), [torch.tensor(3.0)], densities=[0.0]).item() == 1.0


def test_the_threshold_is_exact_to_the_last_bit() -> None:
    """Neighbouring floats fall on both sides of it, and subnormals have magnitudes like all others."""
    for start in (0x3F800000, 0x00000001, 0x0000FFFC, 0x7F7FFFF0, 0x3F80FFFE):
        vector = np.arange(start, start + 8, dtype=np.int32).view(np.float32)
        merged = merge_tensor(
            TIES,
            TIES.parameters(),
            [TIES.model_parameters(density=0.375)],
            torch.zeros(8),
            [torch.from_numpy(vector.copy())],
        )
        assert merged.tolist() == [0.0] * 5 + vector[5:].tolist()


# --- against float64 numpy --------------------------------------------------------------------------------

DYADIC = st.sampled_from([-2.0, -1.0, -0.5, -0.25, 0.25, 0.5, 1.0, 2.0])
DENSITY = st.one_of(st.sampled_from([0.0, 0.1, 0.29, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def merges(draw: st.DrawFn) -> dict[str, Any]:
    """Up to 16 models on a coarse grid: equal magnitudes and exact cancellations everywhere."""
    count, n = draw(st.integers(1, 16)), draw(st.integers(1, 24))
    grid = st.lists(st.integers(-4, 4), min_size=n, max_size=n)
    return {
        "base": np.array(draw(grid)) / 8,
        "models": [np.array(draw(grid)) / 8 for _ in range(count)],
        "weights": [draw(DYADIC) for _ in range(count)],
        "densities": [draw(DENSITY) for _ in range(count)],
        "keep_count": draw(st.sampled_from(["exact", "paper", "mergekit"])),
        "equal_magnitudes": draw(st.sampled_from(["keep", "exact_k"])),
        "zero_sign": draw(st.sampled_from(["positive", "majority"])),
        "divisor": draw(st.sampled_from(["abs_weights", "count", "weights"])),
        "normalize": draw(st.booleans()),
        "lambda_": draw(st.sampled_from([0.5, 1.0, 2.0])),
    }


@given(merges())
def test_every_switch_agrees_with_float64_numpy(arguments: dict[str, Any]) -> None:
    np.testing.assert_allclose(ties(**arguments).numpy(), expected.ties(**arguments), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"zero_sign": "majority", "divisor": "count", "keep_count": "paper"},
        {"equal_magnitudes": "exact_k", "divisor": "weights", "keep_count": "mergekit"},
    ],
    ids=["default", "paper", "mergekit"],
)
def test_bfloat16_checkpoints_agree_with_float64_numpy(switches: dict[str, Any]) -> None:
    """As checkpoints are: the threshold is shared by thousands of elements, and many sums cancel exactly."""
    generator = np.random.default_rng(3)

    def bfloat16(x: Any) -> Any:
        return torch.from_numpy(x).to(torch.bfloat16).double().numpy()

    n = 20_000
    base = bfloat16(generator.normal(0, 0.02, n))
    models = [bfloat16(base + generator.normal(0, 1e-4, n)) for _ in range(4)]
    weights, densities = [1.0, 1.0, 0.5, 0.5], [0.2, 0.5, 0.9, 0.2]
    tau = np.abs(models[0] - base)
    threshold = np.sort(tau)[-int(0.2 * n)]
    assert (tau == threshold).sum() > 100
    assert ((models[0] - base == base - models[1]) & (tau > 0)).sum() > 100
    merged = ties(base, models, weights, densities, **switches).double().numpy()
    wanted = expected.ties(base, models, weights, densities, **switches)
    np.testing.assert_allclose(merged, wanted, rtol=1e-6, atol=1e-9)


def test_exactly_k_across_blocks_keeps_the_first_of_the_equals() -> None:
    n = 2 * SURVEY_ELEMENTS + 1000
    vector = torch.ones(n)
    vector[:10] = 2.0
    vector[-1] = 3.0
    density = (SURVEY_ELEMENTS + 500) / n
    k = expected.kept(density, n, "exact")
    merged = ties(torch.zeros(n), [vector], densities=[density], equal_magnitudes="exact_k")
    assert torch.equal(merged[: k - 1], vector[: k - 1])
    assert not merged[k - 1 : -1].any()
    assert merged[-1] == 3.0


def test_a_long_tensor_has_one_threshold_and_not_one_a_block() -> None:
    n = 2 * SURVEY_ELEMENTS + 5
    vector = torch.arange(1, n + 1, dtype=torch.float32)
    merged = ties(torch.zeros(n), [vector], densities=[0.1])
    k = n // 10
    assert not merged[: n - k].any()
    assert torch.equal(merged[n - k :], vector[n - k :])


def test_nonfinite_elements_take_no_place_among_those_kept() -> None:
    vector = [1.0, 2.0, float("nan"), 3.0, float("inf"), 4.0]
    merged = taus([vector, [0.0] * 6], densities=[0.34, 1.0])
    assert merged[:2] == [0.0, 0.0]
    assert np.isnan(merged[2])
    assert merged[3:] == [3.0, float("inf"), 4.0]
