"""Methods that know each model's Fisher or Gram matrices, against float64 and against what is worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.workers.methods.again import Vector
from tests.workers.methods.cases import CASES, statistics, tensors
from tests.workers.methods.expected import trimmed
from tests.workers.methods.test_more import close, normal, tuned
from workers.kernels.base import Formula, Term
from workers.kernels.cpu import FusedKernels
from workers.methods import METHODS
from workers.methods.evaluate import TORCH, merge_tensor
from workers.methods.resolve import resolve_parameters

pytestmark = pytest.mark.fast

N = 1001
NAN = float("nan")


def merge(
    name: str,
    models: list[Any],
    statistics: list[Any],
    own: list[dict[str, Any]] | None = None,
    base: Any = None,
    **given: Any,
) -> Vector:
    """Merged by the compiled kernels, which must agree with torch's to the bit."""
    method = METHODS[name]
    parameters, models_own = resolve_parameters(method, None, given, own or [{}] * len(models))
    wide, known = (
        [torch.tensor(np.asarray(each), dtype=torch.float32) for each in given_ones]
        for given_ones in (models, statistics)
    )
    start = None if base is None else torch.tensor(np.asarray(base), dtype=torch.float32)
    merged, same = (
        merge_tensor(method, parameters, models_own, start, wide, statistics=known, kernels=kernels)
        for kernels in (FusedKernels(), TORCH)
    )
    assert torch.equal(merged.view(torch.int32), same.view(torch.int32))
    found: Vector = merged.double().numpy()
    return found


def fishers(count: int, sigma: float, seed: int = 50) -> list[Vector]:
    """Squares of gradients of this size: a third of the elements have none in any model, and some in no other."""
    found = []
    for number in range(count):
        generator = np.random.default_rng(seed + number)
        squares = generator.normal(0, sigma * (1 + number), N) ** 2 * (generator.random(N) < 0.6)
        squares[: N // 3] = 0
        found.append(squares.astype(np.float32).astype(np.float64))
    return found


# --- Fisher merging ---------------------------------------------------------------------------------------


def mean(thetas: list[Vector], weights: list[float], importances: list[Vector]) -> Vector:
    weighed = [weight * each for weight, each in zip(weights, importances, strict=True)]
    below = sum(weighed)
    above = sum(each * theta for each, theta in zip(weighed, thetas, strict=True))
    plain = sum(weight * theta for weight, theta in zip(weights, thetas, strict=True)) / sum(weights)
    return np.where(below > 0, above / np.where(below > 0, below, 1), plain)


@pytest.mark.parametrize("sigma", [1.0, 1e-3, 1e-18])
def test_fisher_is_the_weighed_mean(sigma: float) -> None:
    """Down to where float32 would lose the products of Fishers and parameters."""
    models, known, weights = tuned(normal(0, N), 3), fishers(3, sigma), [0.2, 1.0, 3.0]
    own = [{"weight": weight} for weight in weights]
    close(merge("fisher", models, known, own), mean(models, weights, known), 2)


def test_fisher_by_hand() -> None:
    models, known = [[0.0, 8.0, 8.0, 1.0], [4.0, 0.0, 0.0, 3.0]], [[1.0, 1.0, 0.0, 0.0], [3.0, 0.0, 1.0, 0.0]]
    assert merge("fisher", models, known).tolist() == [3, 8, 0, 2]
    # 3·1 against 1·3; alone; alone; nobody knows: (3·1 + 1·3) / 4
    assert merge("fisher", models, known, [{"weight": 3}, {"weight": 1}]).tolist() == [2, 8, 0, 1.5]


def test_no_square_is_negative_and_a_floor_is_the_least() -> None:
    models, known = [[1.0, 1.0], [3.0, 3.0]], [[-5.0, -1.0], [2.0, -9.0]]
    assert merge("fisher", models, known).tolist() == [3, 2]
    assert merge("fisher", models, known, floor=2.0).tolist() == [2, 2]


def test_equal_fishers_give_the_linear_mean() -> None:
    models = tuned(normal(0, N), 3)
    own = [{"weight": weight} for weight in (0.5, 1.0, 2.0)]
    for size in (1e-30, 1.0, 1e30, 0.0):
        found = merge("fisher", models, [np.full(N, size)] * 3, own)
        close(found, (0.5 * models[0] + models[1] + 2 * models[2]) / 3.5)


# --- TIES with a Fisher -----------------------------------------------------------------------------------


def disjoint(taus: list[Vector], weights: list[float], importances: list[Vector]) -> Vector:
    """Straight from the definition, element by element."""
    merged = np.zeros(taus[0].size)
    for at in range(merged.size):
        votes = [(w * tau[at], abs(w), f[at]) for w, tau, f in zip(weights, taus, importances, strict=True)]
        balance = sum(tau * f for tau, _, f in votes) or sum(tau for tau, _, _ in votes)
        agreeing = [(tau, w, f) for tau, w, f in votes if tau and (tau > 0) == (balance >= 0)]
        below = sum(w * f for _, w, f in agreeing)
        if below > 0:
            merged[at] = sum(tau * f for tau, _, f in agreeing) / below
        elif agreeing:
            merged[at] = sum(tau for tau, _, _ in agreeing) / sum(w for _, w, _ in agreeing)
    return merged


@pytest.mark.parametrize("sigma", [1.0, 1e-16])
def test_fisher_ties_weighs_votes_and_means(sigma: float) -> None:
    base, known = normal(0, N), fishers(3, sigma)
    models, weights, densities = tuned(base, 3), [0.7, -0.4, 1.3], [0.3, 1.0, 0.5]
    own = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]
    taus = [trimmed(model - base, density) for model, density in zip(models, densities, strict=True)]
    wanted = base + 0.5 * disjoint(taus, weights, known)
    close(merge("fisher_ties", models, known, own, base, **{"lambda": 0.5}), wanted, 2)


def test_fisher_ties_by_hand() -> None:
    base = [0.0] * 5
    models = [[1.0, 1.0, 1.0, 1.0, 0.0], [-2.0, -2.0, 3.0, -2.0, 2.0]]
    known = [[9.0, 1.0, 1.0, 0.0, 7.0], [1.0, 1.0, 3.0, 0.0, 0.0]]
    # 9 outvotes 2; 2 outvotes 1; both: (1 + 9) / 4; nobody knows: -2 outvotes 1; who alone has changed it counts
    assert merge("fisher_ties", models, known, base=base).tolist() == [1, -2, 2.5, -2, 2]


def test_equal_fishers_give_ties() -> None:
    base = normal(0, N)
    models = tuned(base, 3)
    own = [{"weight": w, "density": 0.4} for w in (0.7, -0.4, 1.3)]
    parameters, models_own = resolve_parameters(METHODS["ties"], None, {}, own)
    wide = [torch.tensor(model, dtype=torch.float32) for model in (base, *models)]
    wanted = merge_tensor(METHODS["ties"], parameters, models_own, wide[0], wide[1:]).double().numpy()
    for size in (1e-30, 1.0, 0.0):
        close(merge("fisher_ties", models, [np.full(N, size)] * 3, own, base), wanted, 2)


# --- RegMean ----------------------------------------------------------------------------------------------


def regression(matrices: list[Vector], grams: list[Vector], weights: list[float], alpha: float) -> Vector:
    """The paper's closed form, for matrices ``[out, in]``."""
    scaled = [
        weight * (alpha * gram + (1 - alpha) * np.diag(np.diag(gram)))
        for weight, gram in zip(weights, grams, strict=True)
    ]
    above = np.sum([matrix @ gram for matrix, gram in zip(matrices, scaled, strict=True)], axis=0)
    found: Vector = np.linalg.solve(np.sum(scaled, axis=0).T, above.T).T
    return found


def data(count: int, rows: int, width: int) -> list[Vector]:
    """Inputs of each model, of very different sizes."""
    return [normal(70 + number, rows, width) * 10.0 ** np.arange(-2, width - 2) for number in range(count)]


def grams_of(inputs: list[Vector]) -> list[Vector]:
    return [(each.T @ each).astype(np.float32).astype(np.float64) for each in inputs]


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(9, 5), (2, 5), (1, 5)])
def test_regmean_is_the_closed_form(alpha: float, shape: tuple[int, int]) -> None:
    matrices, weights = tuned(normal(0, *shape), 3), [1.0, 0.5, 2.0]
    grams = grams_of(data(3, 40, 5))
    own = [{"weight": weight} for weight in weights]
    wanted = regression(matrices, grams, weights, alpha)
    close(merge("regmean", matrices, grams, own, alpha=alpha), wanted, 2)
    turned = merge("regmean", [m.T for m in matrices], grams, own, alpha=alpha, fan_in_fan_out=True)
    close(turned, wanted.T, 2)


def test_regmean_by_hand() -> None:
    """With one input each the output is a mean by the squares of inputs, and with none at all a plain one."""
    assert merge(
        "regmean", [[[0.0, 2.0]], [[4.0, 4.0]]], [[[1.0, 0], [0, 0]], [[3.0, 0], [0, 0]]]
    ).tolist() == [[3, 3]]
    # x = (1, 1) of the first model alone: its output 3 is kept, by equal changes of (2, 3), the mean
    one, none = [[1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]
    assert merge("regmean", [[[1.0, 2.0]], [[3.0, 4.0]]], [one, none], alpha=1).tolist() == [[1, 2]]
    assert merge("regmean", [[[1.0, 2.0]], [[4.0, 0.0]]], [one, none], alpha=1).tolist() == [[2.25, 0.75]]


@pytest.mark.parametrize("width", [6, 48])
def test_what_grams_leave_open_is_averaged(width: int) -> None:
    """Of fewer examples than inputs: the outputs are the models', and nothing else moves."""
    matrices, inputs = tuned(normal(0, 4, width), 2), [normal(80 + n, 2, width) for n in range(2)]
    found = merge("regmean", matrices, grams_of(inputs), alpha=1)
    every = np.concatenate(inputs)
    outputs = np.concatenate([x @ w.T for x, w in zip(inputs, matrices, strict=True)])
    np.testing.assert_allclose(every @ found.T, outputs, atol=2e-5)
    # In units of the inputs' sizes, the change from the mean is made up of inputs.
    sizes = np.sqrt(np.square(every).sum(0))
    change = (found - (matrices[0] + matrices[1]) / 2) * sizes
    others = np.linalg.svd(every / sizes)[2][len(every) :]
    np.testing.assert_allclose(change @ others.T, 0, atol=1e-5)


def test_vectors_without_a_gram_are_averaged() -> None:
    assert merge("regmean", [[1.0, 2.0], [3.0, 6.0]], [], [{"weight": 3}, {"weight": 1}]).tolist() == [1.5, 3]


def test_identical_layers_stay_to_the_bit() -> None:
    matrix = normal(0, 7, 5)
    assert merge("regmean", [matrix] * 3, grams_of(data(3, 40, 5))).tolist() == matrix.tolist()


# --- what every method with statistics keeps to -----------------------------------------------------------

SMALLEST = 1e-5
"""Floors above it are above all of the Fishers."""
KNOWING = [name for name, of in CASES.items() if of.method.statistic is not None]
SHAPES = {name: (31, 17) if "regmean" in name else (2000,) for name in KNOWING}


@pytest.mark.parametrize("name", KNOWING)
def test_every_statistic_takes_part_and_is_left_alone(name: str) -> None:
    of = CASES[name]
    base, models = tensors(of, SHAPES[name])
    known = statistics(of, SHAPES[name])
    before = [statistic.clone() for statistic in known]

    def merged(*statistics: torch.Tensor) -> torch.Tensor:
        return merge_tensor(of.method, of.parameters, of.models, base, models, statistics=statistics)

    plain = merged(*known)
    assert all(torch.equal(one, two) for one, two in zip(known, before, strict=True))
    for number, model in enumerate(of.models):
        if getattr(model, "density", 1.0) > 0 and getattr(of.parameters, "floor", 0.0) < SMALLEST:
            other = [3 * one if at == number else one for at, one in enumerate(known)]
            assert not torch.equal(plain, merged(*other))
    rounded = [statistic.to(torch.bfloat16) for statistic in known]
    assert torch.equal(merged(*rounded), merged(*(statistic.float() for statistic in rounded)))


@pytest.mark.parametrize("name", [name for name in KNOWING if "regmean" not in name])
def test_a_fisher_that_is_not_a_number_stays_where_it_is(name: str) -> None:
    of = CASES[name]
    base, models = tensors(of, SHAPES[name])
    known = statistics(of, SHAPES[name])
    plain = merge_tensor(of.method, of.parameters, of.models, base, models, statistics=known)
    others = torch.arange(plain.numel()) != 613
    for number in range(len(known)):
        hurt = [statistic.clone() for statistic in known]
        hurt[number][613] = NAN
        merged = merge_tensor(of.method, of.parameters, of.models, base, models, statistics=hurt)
        assert bool(torch.isnan(merged[613]))
        assert torch.equal(merged[others], plain[others])


def test_a_gram_that_is_not_a_number_counts_as_zero() -> None:
    gram = np.eye(2)
    hurt = gram.copy()
    hurt[1, 1] = NAN
    models = [[[1.0, 1.0]], [[3.0, 3.0]]]
    assert merge("regmean", models, [gram, hurt]).tolist() == [[2, 1]]


def test_statistics_are_for_programs_alone() -> None:
    with pytest.raises(ValueError, match="read by programs"):
        Formula((Term(0), Term(0, statistic=True)))
