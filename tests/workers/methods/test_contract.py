"""What every merge method keeps to, whatever its mathematics."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest
import torch

from tests.workers.methods.cases import CASES, LONG, WIDE, Case, statistics, tensors
from workers.kernels.base import Operands
from workers.methods import METHODS
from workers.methods.evaluate import TORCH, merge_tensor
from workers.methods.survey import conclude_pass, survey
from workers.task import SURVEY_ELEMENTS, Facts, canonical_json

pytestmark = pytest.mark.fast

NAMES = pytest.mark.parametrize("name", CASES)
SPLIT = pytest.mark.parametrize("name", [name for name, of in CASES.items() if not of.is_whole])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def merge(of: Case, base: torch.Tensor | None, models: list[torch.Tensor]) -> torch.Tensor:
    known = statistics(of, models[0].shape)
    return merge_tensor(
        of.method, of.parameters, of.models, base, models, mask_keys=of.keys, statistics=known
    )


def facts_of(of: Case, base: torch.Tensor | None, models: list[torch.Tensor]) -> Facts:
    return survey(of.method.survey(of.parameters, of.models), run(of, base, models), TORCH)


def run(
    of: Case, base: torch.Tensor | None, models: list[torch.Tensor], first: int = 0, last: int | None = None
) -> Operands:
    elements = slice(first, last)
    chosen = tuple(model[elements] for model in models)
    known = tuple(statistic[elements] for statistic in statistics(of, models[0].shape))
    return Operands(first, None if base is None else base[elements], chosen, of.keys, known)


def bits(x: torch.Tensor) -> torch.Tensor:
    assert x.dtype == torch.float32
    return x.contiguous().view(torch.int32)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and bool((bits(x) == bits(y)).all())


def test_every_method_has_a_case() -> None:
    assert {of.method.name for of in CASES.values()} == set(METHODS)
    assert all(name == method.name for name, method in METHODS.items())


@SPLIT
def test_pieces_in_any_order_and_grouping_find_the_same_facts(name: str) -> None:
    of = CASES[name]
    base, models = tensors(of, LONG)
    pieces = [(0, SURVEY_ELEMENTS), (SURVEY_ELEMENTS, 2 * SURVEY_ELEMENTS), (2 * SURVEY_ELEMENTS, LONG)]
    facts: Facts = {}
    for survey_pass in of.method.survey(of.parameters, of.models):
        summaries = [
            json.loads(
                canonical_json(survey_pass.accumulate(TORCH, run(of, base, models, first, last), facts))
            )
            for first, last in pieces
        ]
        flat = canonical_json(survey_pass.combine(summaries))
        for seed in range(4):
            shuffled = random.Random(seed).sample(summaries, 3)
            nested = survey_pass.combine([shuffled[0], survey_pass.combine(shuffled[1:])])
            assert canonical_json(nested) == flat
        random.Random(1).shuffle(summaries)
        facts = json.loads(canonical_json(conclude_pass(survey_pass, summaries, LONG, facts)))
    whole = facts_of(of, base, models)  # which knows no thresholds by halves
    assert {name: facts[name] for name in whole} == whole


@SPLIT
def test_blocks_merge_to_the_same_bits_alone_and_in_any_order(name: str) -> None:
    of = CASES[name]
    base, models = tensors(of, LONG)
    whole = merge(of, base, models)
    facts = json.loads(canonical_json(facts_of(of, base, models)))
    for first in (2 * SURVEY_ELEMENTS, 0, SURVEY_ELEMENTS):
        last = min(first + SURVEY_ELEMENTS, LONG)
        merged = torch.empty(last - first)
        TORCH.merge(
            run(of, base, models, first, last), of.method.formula(of.parameters, of.models, facts), merged
        )
        assert same_bits(merged, whole[first:last])


@NAMES
def test_two_threads_give_the_bits_of_one(name: str) -> None:
    of = CASES[name]
    base, models = tensors(of, WIDE)
    one = merge(of, base, models)
    torch.set_num_threads(2)
    assert same_bits(one, merge(of, base, models))


@NAMES
def test_inputs_are_left_alone_and_may_be_merged_again(name: str) -> None:
    of = CASES[name]
    base, models = tensors(of, 1001, torch.float32)
    before = [model.clone() for model in models], None if base is None else base.clone()
    once = merge(of, base, models)
    assert same_bits(once, merge(of, base, models))
    assert all(same_bits(model, copy) for model, copy in zip(models, before[0], strict=True))
    if base is not None and before[1] is not None:
        assert same_bits(base, before[1])


@NAMES
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (2,), (5, 3), (0,), (4, 0), (SURVEY_ELEMENTS,)], ids=str)
def test_any_shape_comes_back_finite_and_in_that_shape(name: str, shape: tuple[int, ...]) -> None:
    of = CASES[name]
    base, models = tensors(of, shape)
    merged = merge(of, base, models)
    assert merged.shape == shape
    assert merged.dtype == torch.float32
    assert bool(torch.isfinite(merged).all())


@NAMES
@pytest.mark.parametrize("numel", [1, 1000])
def test_models_that_equal_the_base_give_the_base(name: str, numel: int) -> None:
    of = CASES[name]
    base, models = tensors(of, numel)
    same = models[0] if base is None else base
    merged = merge(of, base, [same] * len(models))
    if base is not None:
        assert bool((merged == base.float()).all())
    else:
        averages = getattr(of.parameters, "normalize", True)
        factor = 1.0 if averages else sum(model.model_dump()["weight"] for model in of.models)
        factor *= getattr(of.models[0], "scale", 1.0)
        torch.testing.assert_close(merged, same.float() * factor, rtol=1e-6, atol=1e-8)


@NAMES
def test_all_zero_tensors_give_zeros(name: str) -> None:
    of = CASES[name]
    zeros = torch.zeros(777)
    merged = merge(of, zeros if of.has_base else None, [zeros] * len(of.models))
    assert merged.tolist() == [0.0] * 777


@NAMES
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nonfinite_elements_stay_where_they_are(name: str, bad: float) -> None:
    of = CASES[name]
    at, numel = 613, 2000
    base, models = tensors(of, numel, torch.float32)
    for index in range(-1 if base is not None else 0, len(models)):
        hurt = [model.clone() for model in models]
        healed = [model.clone() for model in models]
        hurt_base = healed_base = base
        if index < 0 and base is not None:
            hurt_base, healed_base = base.clone(), base.clone()
            hurt_base[at] = bad
            for tensor in (healed_base, *healed):  # every task vector is NaN or Inf there: it counts as zero
                tensor[at] = 0.0
        else:
            hurt[index][at] = bad
            healed[index][at] = 0.0 if base is None else base[at]
        merged, expected = merge(of, hurt_base, hurt), merge(of, healed_base, healed)
        others = torch.arange(numel) != at
        assert same_bits(merged[others], expected[others])
        if math.isnan(bad) and (name != "slerp at its end" or index == 1):
            assert bool(torch.isnan(merged[at]))


@NAMES
def test_the_dtype_that_holds_a_value_does_not_matter(name: str) -> None:
    of = CASES[name]
    base, models = tensors(of, 5000)
    merged = merge(of, base, models)
    assert same_bits(
        merged, merge(of, None if base is None else base.float(), [model.float() for model in models])
    )
    mixed = [model.float() if index % 2 else model for index, model in enumerate(models)]
    assert same_bits(merged, merge(of, base, mixed))


@NAMES
def test_facts_and_parameters_survive_json(name: str) -> None:
    of = CASES[name]
    base, models = tensors(of, 3000)
    facts = facts_of(of, base, models)
    assert json.loads(canonical_json(facts)) == facts
    for parameters in (of.parameters, *of.models):
        for by_alias in (True, False):
            dumped = json.loads(canonical_json(parameters.model_dump(mode="json", by_alias=by_alias)))
            assert type(parameters).model_validate(dumped) == parameters


@SPLIT
def test_facts_stay_small_however_long_the_tensor(name: str) -> None:
    of = CASES[name]
    base, models = tensors(of, LONG)
    assert len(canonical_json(facts_of(of, base, models))) < 200 * len(models)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("passthrough", "slerp at its end")])
def test_every_model_takes_part(name: str) -> None:
    """Changing one model changes the result, so no input is read and then forgotten."""
    of = CASES[name]
    base, models = tensors(of, 4000, torch.float32)
    merged = merge(of, base, models)
    for index, model in enumerate(of.models):
        if getattr(model, "weight", 1.0) == 0.0 or getattr(model, "density", 1.0) == 0.0:
            continue
        changed = list(models)
        changed[index] = models[index] + 0.5 * torch.sign(models[index])
        assert not same_bits(merged, merge(of, base, changed))
