"""The majority of signs, told by the second pass where it can be: never another one than the third would count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from workers.kernels.base import Operands
from workers.methods import METHODS
from workers.methods.base import SurveyPass
from workers.methods.evaluate import TORCH
from workers.methods.resolve import resolve_parameters
from workers.methods.survey import conclude_pass, survey
from workers.task import Facts

pytestmark = pytest.mark.fast

HIGH = 0x3F80
"""The high bits of 1.0 and of what lies less than a 128th above it."""


def passes_of(densities: Sequence[float], weights: Sequence[float] | None = None) -> tuple[SurveyPass, ...]:
    own = [
        {"density": density, "weight": weight}
        for density, weight in zip(densities, weights or [1.0] * len(densities), strict=True)
    ]
    parameters, models = resolve_parameters(METHODS["ties"], "paper", {}, own)
    return METHODS["ties"].survey(parameters, models)


def run(vectors: Sequence[torch.Tensor]) -> Operands:
    return Operands(0, torch.zeros_like(vectors[0]), tuple(vectors), ())


def step(passes: Sequence[SurveyPass], number: int, operands: Operands, facts: Facts) -> Facts:
    summary = passes[number].accumulate(TORCH, operands, facts)
    return conclude_pass(passes[number], [summary], operands.numel, facts)


def near(bits: Any, signs: Any) -> torch.Tensor:
    """Float32 values by their magnitude bits."""
    found = np.asarray(bits, dtype=np.uint32) | (np.asarray(signs, dtype=np.uint32) << 31)
    return torch.from_numpy(found.view(np.float32).copy())


@st.composite
def models(draw: st.DrawFn) -> list[torch.Tensor]:
    """Task vectors whose magnitudes crowd in one bin or two, with some zeros and NaN; signs that may be one-sided."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    numel = draw(st.integers(1, 200))
    spread = draw(st.sampled_from([1, 3, 1 << 15, 1 << 17]))
    negative = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    bare = draw(st.sampled_from([0.0, 0.5, 0.95]))
    found = []
    for _ in range(draw(st.integers(1, 5))):
        bits = (HIGH << 16) + generator.integers(0, spread, numel)
        bits[generator.random(numel) < bare] = 0
        bits[generator.random(numel) < draw(st.sampled_from([0, 0.05]))] = 0x7FC00000
        found.append(near(bits, generator.random(numel) < negative))
    return found


@settings(max_examples=300)
@given(models(), st.data())
def test_what_the_second_pass_is_certain_of_is_what_the_third_counts_whatever_the_guess(
    vectors: list[torch.Tensor], data: st.DataObject
) -> None:
    chosen = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])
    densities = data.draw(st.lists(chosen, min_size=len(vectors), max_size=len(vectors)))
    weights = data.draw(
        st.lists(st.sampled_from([1.0, -0.5, 2.0]), min_size=len(vectors), max_size=len(vectors))
    )
    passes = passes_of(densities, weights)
    operands = run(vectors)
    if len(passes) == 1:
        assert min(densities) == 1
        return
    facts = step(passes, 0, operands, {})
    assert all(
        (g is None) == (h is None) for g, h in zip(facts["trim_guess"], facts["trim_high"], strict=True)
    )
    assert all(
        guess >> 16 == high[0]
        for guess, high in zip(facts["trim_guess"], facts["trim_high"], strict=True)
        if high is not None
    )
    if data.draw(st.booleans()):  # any other guess within the bin is as good
        low = data.draw(st.integers(0, 0xFFFF))
        guesses = [None if g is None else (g >> 16 << 16) + low for g in facts["trim_guess"]]
        facts = facts | {"trim_guess": guesses}
    facts = step(passes, 1, operands, facts)
    counted = step(passes, 2, operands, {key: found for key, found in facts.items() if key != "zero_sign"})
    event("certain" if "zero_sign" in facts else "not certain")
    assert facts.get("zero_sign", counted["zero_sign"]) == counted["zero_sign"]
    assert passes[2].needed(facts) is ("zero_sign" not in facts)
    assert survey(passes, operands, TORCH)["zero_sign"] == counted["zero_sign"]
    balance, wrong = bound_of(vectors, densities, weights, facts)
    assert ("zero_sign" in facts) is (balance > 2 * wrong or balance <= -2 * wrong)


def bound_of(
    vectors: Sequence[torch.Tensor], densities: Sequence[float], weights: Sequence[float], facts: Facts
) -> tuple[int, int]:
    """The balance of the signs elected by the guess, and the elements on the wrong side of it, in numpy."""
    total, wrong = np.zeros(len(vectors[0]), dtype=np.float32), 0
    for model, (vector, density, weight) in enumerate(zip(vectors, densities, weights, strict=True)):
        values = np.nan_to_num(vector.numpy())
        guess, threshold = facts["trim_guess"][model], facts["trim_threshold"][model]
        if density < 1:
            bits = np.abs(values).view(np.int32)
            wrong += int(((bits >= min(guess, threshold)) & (bits < max(guess, threshold))).sum())
            values = np.where(bits >= guess, values, 0.0)
        total += (
            weight * values
        )  # few significant bits: exact in both precisions but for what float32 rounds away
    return int(np.sign(total.astype(np.float32)).sum()), wrong


@pytest.mark.parametrize(
    ("wrong", "positive", "certain"),
    [
        (0, 6, 1),  # 6 of 10 elect +: a balance of 2
        (0, 5, -1),  # a tie is certain, too, when nothing is wrong
        (0, 4, -1),
        (1, 7, 1),
        (1, 6, None),  # what was misjudged may have taken 2 from the balance of 2
        (1, 5, None),
        (1, 4, -1),  # or added 2 to -2: a tie, which is -
        (2, 8, 1),
        (2, 7, None),
        (2, 4, None),
        (2, 3, -1),
    ],
)
def test_the_bound_is_twice_what_lies_between_the_guess_and_the_threshold(
    wrong: int, positive: int, certain: int | None
) -> None:
    """Ten elements above the bin elect alone. In it are ten that a heavier model outvotes, half of them each way."""
    bits = [(HIGH << 16) + 6_000 * number for number in range(10)]
    light = near([0x41000000] * 10 + bits, [0] * positive + [1] * (10 - positive) + [0] * 10)
    heavy = torch.tensor([0.0] * 10 + [100.0, -100.0] * 5)
    operands = run([light, heavy])
    passes = passes_of([0.7, 1.0])  # int(0.7 * 20) + 1 = 15 of the first: 5 of the bin
    facts = step(passes, 0, operands, {})
    assert facts["trim_high"] == [[HIGH, 5], None]
    for guess in (bits[5 + wrong], bits[5 - wrong]):
        found = step(passes, 1, operands, facts | {"trim_guess": [guess, None]})
        assert found["trim_threshold"] == [bits[5], None]
        assert found.get("zero_sign") == certain


def test_differences_of_bfloat16_are_guessed_right_and_need_no_third_pass() -> None:
    generator = np.random.default_rng(0)
    base, *tuned = (
        torch.from_numpy(generator.normal(0, sigma, 20_000).astype(np.float32))
        for sigma in (0.02, 1e-4, 1e-4)
    )
    narrow = base.bfloat16()
    vectors = tuple((narrow.float() + tau).bfloat16() for tau in tuned)
    operands = Operands(0, narrow, vectors, ())
    passes = passes_of([0.2, 0.2])
    facts = step(passes, 0, operands, {})
    assert all(guess % 65536 == 0 for guess in facts["trim_guess"])
    assert not passes[2].needed(step(passes, 1, operands, facts))


def test_float32_is_guessed_within_the_bin_and_where_it_is_crowded_elsewhere_the_third_pass_is_needed() -> (
    None
):
    passes = passes_of([0.49])
    even = near([(HIGH << 16) + low for low in range(0, 65536, 64)], [0] * 1024)
    facts = step(passes, 0, run([even]), {})
    assert abs(facts["trim_guess"][0] - ((HIGH << 16) + int(0.51 * 65536))) <= 128
    assert step(passes, 1, run([even]), facts)["zero_sign"] == 1
    crowded = near([(HIGH << 16) + low for low in range(1024)], [0, 1] * 512)
    facts = step(passes, 1, run([crowded]), step(passes, 0, run([crowded]), {}))
    assert passes[2].needed(facts)


def test_float32_in_any_tensor_of_a_model_makes_the_guess_one_for_float32() -> None:
    passes = passes_of([0.49])
    wide = near([(HIGH << 16) + low for low in range(0, 65536, 64)], [0] * 1024)
    narrow = wide[:8].bfloat16()
    summaries = [passes[0].accumulate(TORCH, run([each]), {}) for each in (narrow, wide, narrow)]
    facts = conclude_pass(passes[0], summaries, 1040, {})
    assert facts["trim_guess"][0] % 65536 != 0
    assert conclude_pass(passes[0], summaries[:1], 8, {})["trim_guess"][0] % 65536 == 0


def test_exactly_k_and_a_fixed_sign_are_not_bounded() -> None:
    parameters, own = resolve_parameters(
        METHODS["ties"], None, {"density": 0.5, "zero_sign": "majority"}, [{}]
    )
    names = [type(each).__name__ for each in METHODS["ties"].survey(parameters, own)]
    assert names == ["GuessingHigh", "BoundingLow", "ElectedSigns"]
    switches = {"density": 0.5, "zero_sign": "majority", "equal_magnitudes": "exact_k"}
    parameters, own = resolve_parameters(METHODS["ties"], None, switches, [{}])
    names = [type(each).__name__ for each in METHODS["ties"].survey(parameters, own)]
    assert names == ["HighHistogram", "LowHistogram", "Equals", "ElectedSigns"]
    parameters, own = resolve_parameters(METHODS["ties"], None, {"density": 0.5}, [{}])
    names = [type(each).__name__ for each in METHODS["ties"].survey(parameters, own)]
    assert names == ["HighHistogram", "LowHistogram"]
