"""DARE against float64 numpy under the same mask, and against what the papers say of it on average."""

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
from workers.random import keep_mask, mask_key
from workers.task import SURVEY_ELEMENTS

pytestmark = pytest.mark.fast

LINEAR, TIES = METHODS["dare_linear"], METHODS["dare_ties"]


def dare(
    method: Any,
    base: Any,
    models: Any,
    weights: list[float],
    densities: list[float],
    seed: int = 0,
    **switches: Any,
) -> torch.Tensor:
    return merge_tensor(
        method,
        method.parameters(**switches),
        [method.model_parameters(weight=w, density=d) for w, d in zip(weights, densities, strict=True)],
        torch.as_tensor(base, dtype=torch.float32),
        [torch.as_tensor(model, dtype=torch.float32) for model in models],
        mask_keys=[mask_key(seed, index, "w") for index in range(len(models))],
    )


def sparse(base: Any, models: Any, densities: list[float], rescale: str, seed: int = 0) -> list[Any]:
    return [
        expected.sparse(
            model - base,
            keep_mask(mask_key(seed, index, "w"), 0, base.size, density).numpy(),
            density,
            rescale,
        )
        for index, (model, density) in enumerate(zip(models, densities, strict=True))
    ]


@st.composite
def merges(draw: st.DrawFn) -> dict[str, Any]:
    count, n = draw(st.integers(1, 16)), draw(st.integers(1, 40))
    grid = st.lists(st.integers(-4, 4), min_size=n, max_size=n)
    weight = st.sampled_from([-1.0, -0.5, 0.25, 0.5, 1.0, 2.0])
    density = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0])
    return {
        "base": np.array(draw(grid)) / 8,
        "models": [np.array(draw(grid)) / 8 for _ in range(count)],
        "weights": [draw(weight) for _ in range(count)],
        "densities": [draw(density) for _ in range(count)],
        "seed": draw(st.integers(0, 2**64)),
    }


@given(merges(), st.sampled_from(["inverse", "l1", "none"]), st.booleans())
def test_dare_linear_agrees_with_float64_numpy(
    arguments: dict[str, Any], rescale: str, normalize: bool
) -> None:
    base, models, weights, densities, seed = arguments.values()
    vectors = sparse(base, models, densities, rescale, seed)
    total = sum(w * v for w, v in zip(weights, vectors, strict=True))
    if normalize:
        total = total / (sum(weights) or 1.0)
    merged = dare(LINEAR, **arguments, rescale=rescale, normalize=normalize, lambda_=0.5).numpy()
    np.testing.assert_allclose(merged, base + 0.5 * total, rtol=1e-5, atol=2e-5)


@given(
    merges(),
    st.sampled_from(["inverse", "none"]),  # exact for these densities, so every election is
    st.sampled_from(["positive", "majority"]),
    st.sampled_from(["abs_weights", "count", "weights"]),
    st.sampled_from([None, 0.0, 0.3, 0.6, 1.0]),
)
def test_dare_ties_agrees_with_float64_numpy(
    arguments: dict[str, Any], rescale: str, zero_sign: str, divisor: str, retrim: float | None
) -> None:
    base, models, weights, densities, seed = arguments.values()
    vectors = sparse(base, models, densities, rescale, seed)
    if retrim is not None:
        vectors = [expected.trimmed(vector, retrim) for vector in vectors]
    signs = expected.elected(vectors, weights, zero_sign)
    switches: dict[str, Any] = {
        "rescale": rescale,
        "zero_sign": zero_sign,
        "divisor": divisor,
        "normalize": True,
    }
    if retrim is not None:
        switches |= {"retrim": True, "trim_density": retrim}
    merged = dare(TIES, **arguments, **switches).numpy()
    wanted = base + expected.merged(vectors, weights, signs, divisor)
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-5)


def test_by_hand() -> None:
    base, model = np.zeros(8), np.arange(1.0, 9.0)
    mask = keep_mask(mask_key(0, 0, "w"), 0, 8, 0.5).numpy()
    assert 0 < mask.sum() < 8
    assert dare(LINEAR, base, [model], [1.0], [0.5]).tolist() == (2 * model * mask).tolist()
    assert dare(LINEAR, base, [model], [1.0], [0.5], rescale="none").tolist() == (model * mask).tolist()
    matched = dare(LINEAR, base, [model], [1.0], [0.5], rescale="l1")
    assert float(matched.abs().sum()) == pytest.approx(36.0, rel=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_mean_survives_the_drop(density: float) -> None:
    n = 1 << 18
    merged = dare(LINEAR, torch.zeros(n), [torch.ones(n)], [1.0], [density])
    spread = ((1 - density) / density / n) ** 0.5
    assert abs(float(merged.double().mean()) - 1) < 5 * spread


def test_density_0_999_drops_one_in_a_thousand_of_bfloat16_too() -> None:
    n = 1 << 18
    ones = torch.ones(n, dtype=torch.bfloat16)
    merged = dare(LINEAR, torch.zeros(n), [ones], [1.0], [0.999])
    assert 150 < int((merged == 0).sum()) < 400


def test_matching_norms_across_blocks_restores_the_l1_norm() -> None:
    n = 2 * SURVEY_ELEMENTS + 17
    vector = torch.from_numpy(np.random.default_rng(0).normal(0, 1e3, n)).float()  # overflows a float16 sum
    merged = dare(LINEAR, torch.zeros(n), [vector], [1.0], [0.1], rescale="l1")
    assert float(merged.double().abs().sum()) == pytest.approx(float(vector.double().abs().sum()), rel=1e-6)


def test_a_norm_that_vanishes_is_not_matched() -> None:
    mask = keep_mask(mask_key(0, 0, "w"), 0, 8, 0.5)
    dropped_only = torch.where(mask, 0.0, 1.0)  # nothing is left after the drop
    assert dare(LINEAR, torch.zeros(8), [dropped_only], [1.0], [0.5], rescale="l1").tolist() == [0.0] * 8
    tiny = torch.full((8,), 1e-9)
    merged = dare(LINEAR, torch.zeros(8), [tiny], [1.0], [0.5], rescale="l1")
    assert merged.tolist() == torch.where(mask, tiny, 0.0).tolist()


@pytest.mark.parametrize("method", [LINEAR, TIES], ids=["linear", "ties"])
def test_density_one_is_the_undropped_merge_and_zero_the_base(method: Any) -> None:
    base = np.linspace(-1, 1, 50)
    models = [base + 0.25, base - 0.5]
    assert torch.equal(dare(method, base, models, [1.0, 1.0], [0.0, 0.0]), torch.tensor(base).float())
    tiny = dare(
        method, base, models, [1.0, 1.0], [1e-12, 1e-300]
    )  # below what 32 bits resolve: nothing, not Inf
    assert torch.equal(tiny, torch.tensor(base).float())
    plain: Any = METHODS["task_arithmetic" if method is LINEAR else "ties"]
    undropped = merge_tensor(
        plain,
        plain.parameters(normalize=False),
        [plain.model_parameters()] * 2,
        torch.tensor(base).float(),
        [torch.tensor(model).float() for model in models],
    )
    assert torch.equal(dare(method, base, models, [1.0, 1.0], [1.0, 1.0]), undropped)


def test_one_models_density_leaves_the_masks_of_the_others_alone() -> None:
    base, models = np.zeros(500), [np.full(500, 1.0), np.full(500, 1000.0)]
    merged = [dare(LINEAR, base, models, [1.0, 1.0], [density, 0.5]).numpy() for density in (0.25, 0.75)]
    assert ((merged[0] >= 2000) == (merged[1] >= 2000)).all()
    assert not (merged[0] == merged[1]).all()


def test_the_seed_changes_the_mask() -> None:
    base, models = np.zeros(500), [np.ones(500)]
    merged = [dare(LINEAR, base, models, [1.0], [0.5], seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(merged[0], merged[1])
    assert not torch.equal(merged[0], merged[2])


def test_a_nan_is_neither_dropped_nor_spread() -> None:
    model = np.ones(400)
    model[7] = model[8] = np.nan
    model[9] = model[10] = np.inf
    for rescale in ("inverse", "l1"):
        merged = dare(LINEAR, np.zeros(400), [model], [1.0], [0.01], rescale=rescale)
        assert torch.isnan(merged).nonzero().flatten().tolist() == [7, 8]
