"""The newer methods against float64 re-derivations, and against what can be worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.workers.methods import again
from tests.workers.methods.again import Vector
from tests.workers.philox import numpy_words
from workers.errors import RecipeError
from workers.kernels.cpu import FusedKernels
from workers.kernels.rows import exponential
from workers.methods import METHODS
from workers.methods.band import band_ranks
from workers.methods.evaluate import merge_tensor, merge_tensors
from workers.methods.magprune import DellaModel, chances_of
from workers.methods.resolve import resolve_parameters

pytestmark = pytest.mark.fast

N = 1001


def normal(seed: int, *shape: int, sigma: float = 1.0) -> Vector:
    return np.random.default_rng(seed).normal(0, sigma, shape).astype(np.float32).astype(np.float64)


def tuned(base: Vector, count: int, sigma: float = 0.3) -> list[Vector]:
    return [
        (base + normal(10 + i, *base.shape, sigma=sigma * (i + 1))).astype(np.float32).astype(np.float64)
        for i in range(count)
    ]


def merge(
    name: str,
    base: Any,
    models: list[Any],
    own: list[dict[str, Any]] | None = None,
    profile: str | None = None,
    keys: tuple[int, ...] = (),
    **given: Any,
) -> Vector:
    method = METHODS[name]
    parameters, models_own = resolve_parameters(method, profile, given, own or [{}] * len(models))
    wide = [torch.tensor(np.asarray(model), dtype=torch.float32) for model in models]
    start = None if base is None else torch.tensor(np.asarray(base), dtype=torch.float32)
    merged = merge_tensor(method, parameters, models_own, start, wide, mask_keys=keys, kernels=FusedKernels())
    found: Vector = merged.double().numpy()
    return found


def close(found: Vector, wanted: Any, scale: float = 1.0) -> None:
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=4e-7 * scale * max(1.0, float(np.abs(wanted).max()))
    )


# --- on the sphere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.9), (2.0, -0.5)])
def test_nuslerp_turns_by_the_weights(weights: tuple[float, float]) -> None:
    base, a, b = normal(0, N), normal(1, N), normal(2, N)
    own = [{"weight": weight} for weight in weights]
    t = weights[1] / sum(weights)
    close(merge("nuslerp", None, [a, b], own), again.turned(a, b, t))
    close(merge("nuslerp", base, [a, b], own), base + again.turned(a - base, b - base, t), 2)


@pytest.mark.parametrize("row_wise", [False, True])
def test_nuslerp_turns_each_row_or_column(row_wise: bool) -> None:
    base, a, b = normal(0, 7, 9), normal(1, 7, 9), normal(2, 7, 9)
    found = merge("nuslerp", base, [a, b], [{"weight": 1}, {"weight": 3}],
                  nuslerp_flatten=False, nuslerp_row_wise=row_wise)  # fmt: skip
    along = (lambda x: x.T) if row_wise else (lambda x: x)
    pairs = zip(along(a - base), along(b - base), strict=True)
    close(found, base + along(np.stack([again.turned(x, y, 0.75) for x, y in pairs])), 2)


def test_nuslerp_by_hand() -> None:
    half = np.sqrt(0.5)
    equal = [{"weight": 1}, {"weight": 1}]
    close(merge("nuslerp", None, [[1, 0], [0, 1]], equal), [half, half])
    close(merge("nuslerp", None, [[2, 0], [0, 0]], equal), [2 * half, 0])  # a zero vector is at right angles
    close(merge("nuslerp", None, [[1, 1], [1, 1]], equal), [1, 1])
    close(merge("nuslerp", None, [[1, 0], [0, 1]], [{"weight": 1}, {"weight": -1}]), [half, half])


def test_multislerp_is_the_mean_direction_at_the_mean_length() -> None:
    base = normal(0, N)
    models, weights = tuned(base, 4, 1.0), [0.4, 0.3, 0.2, 0.1]
    own = [{"weight": 2 * weight} for weight in weights]
    taus = [model - base for model in models]
    close(merge("multislerp", None, models, own), again.spherical_mean(models, weights), 2)
    close(merge("multislerp", base, models, own), base + again.spherical_mean(taus, weights), 4)
    close(
        merge("multislerp", None, models, own, normalize_weights=False),
        again.spherical_mean(models, [2 * weight for weight in weights]), 4,
    )  # fmt: skip


def test_multislerp_by_hand() -> None:
    close(merge("multislerp", None, [[3, 0], [0, 1]]), np.array([2, 2]) * np.sqrt(0.5))
    close(merge("multislerp", None, [[1, 0], [-2, 0]]), [-0.5, 0])  # opposite: the plain mean
    close(merge("multislerp", None, [[5, 0]], [{"weight": 0.3}]), [5, 0])


def test_at_the_karcher_mean_the_tangents_cancel() -> None:
    models = [normal(i, N, sigma=i + 1.0) for i in range(4)]
    found = merge("karcher", None, models, max_iter=50, tol=1e-9)
    norms = [np.linalg.norm(model) for model in models]
    assert np.linalg.norm(found) == pytest.approx(np.mean(norms), rel=1e-6)
    unit = found / np.linalg.norm(found)
    pull = sum(again.tangent(unit, model / norm) for model, norm in zip(models, norms, strict=True))
    assert np.linalg.norm(pull) < 1e-6
    close(merge("karcher", None, [[2, 0], [0, 4]]), np.array([3, 3]) * np.sqrt(0.5))
    close(merge("karcher", None, [[2, 0], [0, 0]]), [1, 0])  # nothing has no direction, but a length


def test_model_stock_goes_as_far_as_the_angles_say() -> None:
    base = normal(0, 6, 50)
    models = [model + 0.3 * base for model in tuned(base, 3)]
    flat = [model.ravel() for model in models]
    close(merge("model_stock", base, models).ravel(), again.stock(base.ravel(), flat), 2)
    rows = np.stack([again.stock(base[i], [model[i] for model in models]) for i in range(6)])
    close(merge("model_stock", base, models, filter_wise=True), rows, 4)
    close(merge("model_stock", [0, 0], [[1, 0], [0, 1]]), [0, 0])  # at right angles: the base
    close(merge("model_stock", [0, 0], [[1, 1], [3, 3]]), [2, 2])  # of one direction: their mean


# --- what stays and what goes -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_keeps_the_middle(name: str) -> None:
    base = normal(0, N)
    (model,) = tuned(base, 1)
    for density, gamma in ((0.5, 0.1), (0.9, 0.01), (0.3, 0.9), (0.05, 0.0)):
        found = merge(name, base, [model], [{"density": density, "gamma": gamma}], **{"lambda": 0.5})
        close(found, base + 0.5 * again.middle(model - base, density, gamma))


def test_breadcrumbs_by_hand() -> None:
    tau = [1, -2, 3, -4, 5, -6, 7, -8, 9, -10]
    found = merge("breadcrumbs", [0] * 10, [tau], [{"density": 0.5, "gamma": 0.2, "weight": 2}])
    assert found.tolist() == [0, 0, 0, -8, 10, -12, 14, -16, 0, 0]
    equal = merge("breadcrumbs", [0] * 5, [[4, 2, 2, 2, 1]], [{"density": 0.4, "gamma": 0.2}])
    assert equal.tolist() == [0, 2, 2, 2, 0]  # equal magnitudes stay together
    one = [{"density": 0.9, "gamma": 0.5}]
    assert merge("breadcrumbs", 0.0, [3.0], one) == 3
    assert merge("breadcrumbs", 0.0, [3.0], one, "mergekit") == 0


def test_so_many_stay_as_the_density_says() -> None:
    assert band_ranks(0.5, 0.1, 10, "exact") == (2, 6)
    assert band_ranks(0.5, 0.7, 10, "exact") == (6, 10)  # gamma gives way
    assert band_ranks(0.01, 0.0, 10, "exact") == (1, 1)
    assert band_ranks(0.01, 0.0, 10, "mergekit") == (1, 0)
    assert band_ranks(0.3, 0.0, 10, "exact") == (1, 3)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.05])
def test_sce_weighs_by_energy_what_differs_most(fraction: float) -> None:
    base = normal(0, N)
    models = tuned(base, 3)
    models[1][:200] = models[0][:200] = models[2][:200] = base[:200]
    close(merge("sce", base, models, select_topk=fraction), again.sce(base, models, fraction), 2)


def test_sce_by_hand() -> None:
    # Energies 8 and 2, so weights 0.8 and 0.2; signs agree in the first, the larger wins the second.
    close(merge("sce", [0, 0], [[2, 2], [1, -1]]), [0.8 * 2 + 0.2 * 1, 2])
    assert merge("sce", [1, 1], [[3, 3], [3, 3]], select_topk=0.5).tolist() == [1, 1]  # nothing differs


def test_small_energies_count_unless_mergekit_is_followed() -> None:
    base, (a, b) = np.zeros(N), (normal(1, N, sigma=1e-4), normal(2, N, sigma=2e-4))
    agree = np.sign(a) == np.sign(b)
    assert not np.allclose(merge("sce", base, [a, b])[agree], ((a + b) / 2)[agree], rtol=1e-3)
    np.testing.assert_allclose(
        merge("sce", base, [a, b], profile="mergekit")[agree], ((a + b) / 2)[agree], rtol=1e-6
    )


def test_ram_averages_what_is_shared_and_keeps_what_is_not() -> None:
    base = normal(0, N)
    models = tuned(base, 3)
    for i, model in enumerate(models):
        model[i::3] = base[i::3]
    close(merge("ram", base, models, epsilon=0.1), again.ram(base, models, 0.1, [1, 1, 1]))
    factors = again.overlap_factors(base, models, 0.1, 0.5, 3.0)
    assert min(factors) > 1
    close(merge("ramplus_tl", base, models, epsilon=0.1, r=0.5, alpha=3.0),
          again.ram(base, models, 0.1, factors), 2)  # fmt: skip


def test_ram_by_hand() -> None:
    models = [[0.25, 3, 4, 0], [-0.25, 5, 0, 0]]
    assert merge("ram", [0] * 4, models, epsilon=0.25).tolist() == [0, 4, 4, 0]
    # The first has one shared and one of its own: overlap 1, cut to 0.5.
    found = merge("ramplus_tl", [0] * 4, models, epsilon=0.25, r=0.5, alpha=0.5)
    assert found.tolist() == [0, 4, 5, 0]


def test_ram_counts_over_the_whole_model_when_asked() -> None:
    method = METHODS["ramplus_tl"]
    bases = {"a": torch.zeros(2), "b": torch.zeros(4)}
    first = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([2.0, 0, 0, 0])}
    second = {"a": torch.tensor([1.0, 1.0]), "b": torch.zeros(4)}
    for scope, wanted in (
        ("tensor", 2.0),
        ("model", 4.0),
    ):  # of "b" alone nothing is shared; of both two to one
        parameters = method.parameters(epsilon=0.5, r=0.5, alpha=9.0, count_scope=scope)
        merged = merge_tensors(method, parameters, (method.model_parameters(),) * 2, bases, [first, second])
        assert merged["b"][0] == wanted
        assert merged["a"].tolist() == [1, 1]


def test_consensus_keeps_what_enough_models_use() -> None:
    base = normal(0, N)
    models, weights, strict = tuned(base, 4), [1.0, 0.5, 0.7, 0.3], [0.4, 0.2, 0.6, 1.0]
    own = [{"weight": w, "mask_lambda": least} for w, least in zip(weights, strict, strict=True)]
    for agreement in (0, 1, 2, 4):
        found = merge("consensus", base, models, own, agreement=agreement)
        close(found, again.agreed(base, models, weights, strict, agreement), 2)
    # Of use to the first alone, to both, to none.
    one, two = [[8, 1, 1], [0, 1, -1]]
    found = merge("consensus", [0] * 3, [one, two], agreement=2, mask_lambda=0.5)
    assert found.tolist() == [0, 2, 0]
    assert merge("consensus", [0] * 3, [one, two], agreement=1, mask_lambda=0.5).tolist() == [8, 2, 0]


def test_nearswap_takes_what_is_near() -> None:
    base = normal(0, N)
    (model,) = tuned(base, 1)
    share = np.clip(0.2 / np.abs(model - base), 0, 1)
    close(merge("nearswap", base, [model], t=0.2), share * model + (1 - share) * base)
    assert merge("nearswap", [1, 1, 1], [[1.25, 3, 1]], t=0.5).tolist() == [1.25, 1.5, 1]
    assert merge("nearswap", [1, 1], [[1, 3]], t=0).tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(40, 25), (300,), (3, 4, 50)])
def test_arcee_fusion_takes_what_stands_out(shape: tuple[int, ...]) -> None:
    base = normal(0, *shape)
    (model,) = tuned(base, 1)
    found = merge("arcee_fusion", base, [model])
    close(found, again.fused(base, model))
    assert 0 < np.count_nonzero(found != base) < 0.2 * base.size


def test_the_exponential_is_the_exponential() -> None:
    x = -np.abs(np.random.default_rng(0).normal(0, 30, 4000))
    x[:4] = 0, -1e-300, -699.9, -1
    np.testing.assert_allclose(exponential(torch.from_numpy(x)).numpy(), np.exp(x), rtol=1e-15)


# --- DELLA ------------------------------------------------------------------------------------------------


def test_chances_are_the_papers_or_mergekits() -> None:
    model = DellaModel(density=0.5, epsilon=0.2)
    assert chances_of(model, 5, "half_width").tolist() == pytest.approx([0.3, 0.4, 0.5, 0.6, 0.7])
    # Drop with p_min + epsilon/n · rank, the largest first: 0.4, 0.44 .. 0.56 (2406.11617, section 3.1).
    assert chances_of(model, 5, "width").tolist() == pytest.approx([0.44, 0.48, 0.52, 0.56, 0.6])
    assert chances_of(model, 1, "half_width").tolist() == [0.5]


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_della_keeps_whom_the_words_choose(rescale: str) -> None:
    rows, width, key = 40, 25, 77
    tau = normal(3, rows, width)
    found = merge(
        "della_linear", tau * 0, [tau], [{"density": 0.5, "epsilon": 0.3}], keys=(key,), rescale=rescale
    )
    chances = np.linspace(0.2, 0.8, width)
    ranks = np.argsort(np.argsort(np.abs(tau), axis=1), axis=1)
    words = numpy_words(key, 0, rows * width).reshape(rows, width)
    kept = words < (chances * 2**32)[ranks]
    pruned = np.where(kept, tau, 0)
    wanted = {
        "inverse": pruned / chances[ranks],
        "l1": pruned * np.abs(tau).sum() / np.abs(pruned).sum(),
        "none": pruned,
    }[rescale]
    close(found, wanted, 2)


def test_della_keeps_the_large_rather_than_the_small() -> None:
    width = 4
    tau = np.tile([4.0, -3.0, 2.0, -1.0], (5000, 1))
    found = merge("della", tau * 0, [tau], [{"density": 0.5, "epsilon": 0.25}], keys=(5,), rescale="none")
    share = (found != 0).mean(axis=0)
    wanted = np.linspace(0.75, 0.25, width)
    assert np.abs(share - wanted).max() < 5 * 0.5 / np.sqrt(5000)


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_without_anything_to_draw_della_is_task_arithmetic_or_ties(name: str) -> None:
    base = normal(0, N)
    models, own = tuned(base, 2), [{"weight": 0.5}, {"weight": 0.8}]
    other = {"della": "ties", "della_linear": "task_arithmetic"}[name]
    found = merge(name, base, models, [weights | {"density": 1.0} for weights in own])
    assert found.tolist() == merge(other, base, models, own).tolist()


def test_chances_beyond_certainty_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"epsilon 0\.15 is too large for density 0\.1"):
        resolve_parameters(METHODS["della"], None, {}, [{"density": 0.1}])


# --- the rest ---------------------------------------------------------------------------------------------


def test_a_negative_weight_takes_a_task_away() -> None:
    """Negation (2212.04089, section 3): unlearning is task arithmetic with a negative weight."""
    base, model = [1.0, 2.0, 3.0], [1.5, 2.0, 2.0]
    assert merge("task_arithmetic", base, [model], [{"weight": -1}]).tolist() == [0.5, 2, 4]
    assert merge("task_arithmetic", base, [model, [2, 2, 3]], [{"weight": -1}, {"weight": 1}]).tolist() == [
        1.5,
        2,
        4,
    ]


def test_a_scale_multiplies() -> None:
    assert merge("passthrough", None, [[1, -2]], [{"scale": 0.5}]).tolist() == [0.5, -1]


ANY_ORDER = {"ram": {}, "ramplus_tl": {}, "sce": {}, "karcher": {}, "model_stock": {}, "multislerp": {},
             "consensus": {}, "breadcrumbs": {"density": 0.5}, "breadcrumbs_ties": {"density": 0.5}}  # fmt: skip


@pytest.mark.parametrize("name", ANY_ORDER)
def test_the_order_of_models_does_not_matter(name: str) -> None:
    base = normal(0, N)
    models = tuned(base, 3)
    start = None if name in ("karcher", "multislerp") else base
    one = merge(name, start, models, **ANY_ORDER[name])
    close(merge(name, start, models[::-1], **ANY_ORDER[name]), one, 4)


SAME = ["nuslerp", "multislerp", "karcher", "model_stock", "ram", "sce"]


@pytest.mark.parametrize("name", SAME)
def test_identical_models_give_that_model(name: str) -> None:
    base = normal(0, N)
    (model,) = tuned(base, 1)
    start = base if name in ("model_stock", "ram", "sce") else None
    own = [{"weight": 1.0}] * 2 if name in ("nuslerp", "multislerp") else [{}, {}]
    close(merge(name, start, [model, model], own), model)
