"""One threshold over a whole model: against the authors' own semantics in float64 numpy, and by hand."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.workers.methods import expected
from workers.errors import RecipeError
from workers.kernels.base import Operands
from workers.methods import METHODS
from workers.methods.base import Parameters
from workers.methods.evaluate import TORCH, merge_tensor, merge_tensors
from workers.methods.resolve import resolve_parameters
from workers.methods.survey import conclude_pass, survey_all
from workers.random import keep_mask, mask_key
from workers.task import SURVEY_ELEMENTS, Facts, canonical_json

pytestmark = pytest.mark.fast

Model = Mapping[str, Any]


def paper(
    name: str, own: Sequence[Mapping[str, Any]], **values: Any
) -> tuple[Parameters, tuple[Parameters, ...]]:
    return resolve_parameters(METHODS[name], "paper", values, own)


def tensors(model: Model) -> dict[str, torch.Tensor]:
    return {name: torch.as_tensor(values, dtype=torch.float32) for name, values in model.items()}


def ties(base: Model, models: Sequence[Model], density: float, **values: Any) -> dict[str, torch.Tensor]:
    parameters, own = paper("ties", [{"density": density}] * len(models), **values)
    assert parameters.survey_scope == "model"
    return merge_tensors(METHODS["ties"], parameters, own, tensors(base), [tensors(m) for m in models])


@st.composite
def whole_models(draw: st.DrawFn) -> dict[str, Any]:
    shapes = {"a": (draw(st.integers(1, 9)),), "b": (2, draw(st.integers(1, 8))), "c": (1,)}
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.integers(1, 6))

    def model() -> dict[str, Any]:
        return {name: generator.integers(-spread, spread + 1, shape) / 8 for name, shape in shapes.items()}

    models = [model() for _ in range(draw(st.integers(1, 16)))]
    density = draw(st.sampled_from([0.0, 0.05, 0.2, 0.5, 0.7, 0.99]))
    return {"base": model(), "models": models, "density": density}


@settings(max_examples=60)
@given(whole_models(), st.sampled_from([0.5, 1.0, 2.0]))
def test_the_paper_profile_is_the_authors_ties(arguments: dict[str, Any], lambda_: float) -> None:
    wanted = expected.authors_ties(**arguments, lambda_=lambda_)
    merged = ties(**arguments, **{"lambda": lambda_})
    assert merged.keys() == wanted.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor.numpy(), wanted[name], rtol=1e-6, atol=1e-6)


@settings(max_examples=20)
@given(whole_models(), st.integers(0, 2**62))
def test_the_paper_profile_of_dare_trims_what_is_left_of_the_whole_model(
    arguments: dict[str, Any], seed: int
) -> None:
    base, models, density = arguments.values()
    keys = {name: [mask_key(seed, index, name) for index in range(len(models))] for name in base}
    dropped = []
    for index, model in enumerate(models):
        vectors = {}
        for name, values in model.items():
            mask = keep_mask(keys[name][index], 0, values.size, 0.5).numpy().reshape(values.shape)
            vectors[name] = base[name] + expected.sparse(values - base[name], mask, 0.5, "inverse")
        dropped.append(vectors)
    wanted = expected.authors_ties(base, dropped, density)
    parameters, own = paper("dare_ties", [{"density": 0.5}] * len(models), trim_density=density)
    inputs = [tensors(model) for model in models]
    merged = merge_tensors(METHODS["dare_ties"], parameters, own, tensors(base), inputs, mask_keys=keys)
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor.numpy(), wanted[name], rtol=1e-6, atol=1e-6)


def test_checkpoints_in_bfloat16_agree_with_the_authors() -> None:
    """Layers that moved little lose everything, and those that moved much keep most: the point of the scope."""
    generator = np.random.default_rng(3)
    sigmas = {"still": 1e-4, "moved": 1e-3, "changed": 3e-3}

    def bfloat16(x: Any) -> torch.Tensor:
        return torch.from_numpy(x).to(torch.bfloat16)

    base = {name: bfloat16(generator.normal(0, 0.02, 6000)) for name in sigmas}
    models = [
        {name: bfloat16(base[name].double().numpy() + generator.normal(0, s, 6000)) for name, s in sigmas.items()}
        for _ in range(3)
    ]  # fmt: skip
    parameters, own = paper("ties", [{"density": 0.2}] * 3)
    merged = merge_tensors(METHODS["ties"], parameters, own, base, models)
    exact = [{name: tensor.double().numpy() for name, tensor in model.items()} for model in (base, *models)]
    wanted = expected.authors_ties(exact[0], exact[1:], 0.2)
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor.double().numpy(), wanted[name], rtol=1e-6, atol=1e-9)
    kept = [float((merged[name] != base[name].float()).double().mean()) for name in sigmas]
    assert kept[0] < 0.01
    assert 0.1 < kept[1] < 0.5 < kept[2]


def test_one_threshold_for_all_tensors_by_hand() -> None:
    base = {"small": [0.0] * 4, "large": [0.0] * 2}
    model = {"small": [1.0, -2.0, 3.0, 4.0], "large": [10.0, -20.0]}
    merged = ties(base, [model], 0.34)  # int(2.04) + 1 = 3 of 6
    assert {name: tensor.tolist() for name, tensor in merged.items()} == {
        "small": [0.0, 0.0, 0.0, 4.0],
        "large": [10.0, -20.0],
    }
    alone = ties(base, [model], 0.34, trim_scope="model", keep_count="exact")  # floor(2.04)
    assert {name: tensor.tolist() for name, tensor in alone.items()} == {
        "small": [0.0] * 4,
        "large": [10.0, -20.0],
    }


@pytest.mark.parametrize(("elsewhere", "zero"), [(1.0, 1.0), (-1.0, -1.0)])
def test_a_zero_sum_takes_the_sign_of_the_whole_models_majority(elsewhere: float, zero: float) -> None:
    """The tensor where the sum cancels elects nothing itself; what another tensor elects decides."""
    base = {"cancels": [0.0], "elects": [0.0] * 3}
    models = [
        {"cancels": [1.0], "elects": [elsewhere] * 3},
        {"cancels": [-1.0], "elects": [elsewhere] * 3},
    ]
    assert ties(base, models, 0.99)["cancels"].tolist() == [zero]


def test_without_a_majority_negatives_win() -> None:
    base = {"cancels": [0.0], "elects": [0.0] * 2}
    models = [{"cancels": [1.0], "elects": [1.0, -1.0]}, {"cancels": [-1.0], "elects": [1.0, -1.0]}]
    assert ties(base, models, 0.99)["cancels"].tolist() == [-1.0]


def test_one_tensor_is_a_model_of_one() -> None:
    generator = torch.Generator().manual_seed(1)
    base, *models = (torch.randn(3000, generator=generator) for _ in range(4))
    parameters, own = paper("ties", [{"density": 0.3}] * 3)
    within, _ = paper("ties", [{"density": 0.3}] * 3, trim_scope="tensor")
    assert within.survey_scope == "tensor"
    merged = merge_tensor(METHODS["ties"], parameters, own, base, models)
    assert torch.equal(merged, merge_tensor(METHODS["ties"], within, own, base, models))


def test_empty_tensors_and_models_take_no_part() -> None:
    merged = ties({"a": [1.0], "none": []}, [{"a": [2.0], "none": []}], 0.5)
    assert merged["a"].tolist() == [2.0]
    assert merged["none"].shape == (0,)
    assert ties({"none": []}, [{"none": []}], 0.5)["none"].shape == (0,)


def test_pieces_of_all_tensors_in_any_order_and_grouping_find_the_same_facts() -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = [SURVEY_ELEMENTS + 7, 100, 1]
    parameters, own = paper("dare_ties", [{"density": 0.5}] * 2, trim_density=0.1)
    runs = []
    for number, length in enumerate(lengths):
        base, *models = (torch.randn(length, generator=generator) for _ in range(3))
        keys = (mask_key(0, 0, str(number)), mask_key(0, 1, str(number)))
        runs.append(Operands(0, base, tuple(models), keys))
    pieces = [*runs[1:], part(runs[0], 0, SURVEY_ELEMENTS), part(runs[0], SURVEY_ELEMENTS, lengths[0])]
    passes = METHODS["dare_ties"].survey(parameters, own)
    assert len(passes) == 3
    facts: Facts = {}
    for survey_pass in passes:
        summaries = [json.loads(canonical_json(survey_pass.accumulate(TORCH, p, facts))) for p in pieces]
        random.Random(3).shuffle(summaries)
        nested = [survey_pass.combine(summaries[:2]), survey_pass.combine(summaries[2:])]
        facts = conclude_pass(survey_pass, nested, sum(lengths), facts)
    assert facts == survey_all(passes, runs, TORCH)


def part(run: Operands, first: int, last: int) -> Operands:
    assert run.base is not None
    return Operands(first, run.base[first:last], tuple(m[first:last] for m in run.models), run.mask_keys)


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("ties", {"equal_magnitudes": "exact_k"}, "only defined within a tensor; use keep"),
        ("dare_ties", {"equal_magnitudes": "exact_k"}, "only defined within a tensor; use keep"),
        ("dare_ties", {"rescale": "l1"}, "only matched within a tensor; use inverse"),
    ],
)
def test_what_has_no_meaning_over_a_whole_model_is_refused(
    name: str, values: dict[str, Any], says: str
) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        paper(name, [{}], **values)
    assert "trim_scope 'tensor'" in str(caught.value)
    paper(name, [{}], **values, trim_scope="tensor")
    if name == "dare_ties":
        parameters, _ = paper(name, [{}], **values, retrim=False)
        assert parameters.survey_scope == "tensor"


def test_methods_without_a_trim_survey_each_tensor() -> None:
    scopes = {name: method.parameters.model_construct().survey_scope for name, method in METHODS.items()}
    assert set(scopes.values()) == {"tensor"}
