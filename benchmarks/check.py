"""Whether a merge is right: sampled tensors against the methods' definitions in float64, written here anew.

Nothing of Mergemill's arithmetic is used. A merged element may be half a unit in bfloat16's last place away (and
float32's rounding errors); mergekit rounds every intermediate to bfloat16 under ``dtype: bfloat16`` and may be a few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from benchmarks.cases import DENSITY, WEIGHT, Case, T
from benchmarks.places import Place, read_tensor
from benchmarks.results import MERGEKIT
from benchmarks.runs import BenchmarkError

HALF_UNIT = 2.0**-8
"""Half a unit in the last place of bfloat16, relative, at most."""
FLOAT32 = 1e-6
"""Relative to the sum of the magnitudes: sixteen float32 roundings."""
MERGEKIT_UNITS = 4
"""How many half units mergekit's result may be away, relative to the sum of the magnitudes."""
SIGMAS = 6


def samples(layers: int) -> list[str]:
    """The tensors that are looked at: a vector and a matrix of the middle and the last layer."""
    return [
        name
        for layer in sorted({layers // 2, layers - 1})
        for name in (
            f"model.layers.{layer}.post_attention_layernorm.weight",
            f"model.layers.{layer}.self_attn.k_proj.weight",
        )
    ]


def check(place: Place, case: Case, what: str, output: str) -> str:
    """What was found right about a result.

    :raises BenchmarkError: it is wrong.
    """
    wrong = elements = 0
    for name in samples(place.inputs.size.layers):
        inputs = [read_tensor(place.store, place.model(model), name) for model in case.models]
        merged = read_tensor(place.store, output, name)
        if merged.shape != inputs[0].shape:
            raise BenchmarkError(f"{what} {case.method}: {name} has the shape {tuple(merged.shape)}")
        wrong += count_wrong(case.method, inputs, merged, theirs=what == MERGEKIT)
        elements += merged.numel()
    if wrong and not (what == MERGEKIT and case.method in ("ties", "dare_ties")):
        raise BenchmarkError(f"{what} {case.method}: {wrong} of {elements} sampled elements are wrong")
    agree = "all" if not wrong else f"{1 - wrong / elements:.2%}"
    return f"{place.name}, {case.method}, {what}: {agree} of {elements:,} sampled elements as defined"


def count_wrong(method: str, inputs: Sequence[torch.Tensor], merged: torch.Tensor, theirs: bool) -> int:
    """How many elements are not what the method's definition says, in float64."""
    if method == "dare_ties":
        return _wrong_dare(inputs, merged)
    expected, scale, clear = expect(method, inputs)
    ours = HALF_UNIT * expected.abs() + FLOAT32 * scale
    limit = MERGEKIT_UNITS * HALF_UNIT * scale if theirs else ours
    return int((~((merged - expected).abs() <= limit) & clear).sum())  # NaN is never within a limit


def expect(method: str, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A method's result, the sum of the magnitudes that went into it, and where it is well defined."""
    clear = torch.ones_like(inputs[0], dtype=torch.bool)
    if method == "linear":
        return sum_of(inputs) / len(inputs), sum_of([x.abs() for x in inputs]) / len(inputs), clear
    if method == "slerp":
        return _slerp(*inputs), inputs[0].abs() + inputs[1].abs(), clear
    base, *tuned = inputs
    vectors = [x - base for x in tuned]
    scale = base.abs() + sum_of([v.abs() for v in vectors])
    if method == "task_arithmetic":
        return base + WEIGHT * sum_of(vectors), scale, clear
    weighted = [WEIGHT * _trimmed(vector) for vector in vectors]
    total = sum_of(weighted)
    # A sum that all but cancels may be elected either way by float32
    clear = (total == 0) | (total.abs() > FLOAT32 * sum_of([v.abs() for v in weighted]))
    sign = torch.where(total >= 0, 1.0, -1.0)
    agreeing = [torch.where(v.sign() == sign, v, 0.0) for v in weighted]
    divisor = sum_of([torch.where(v.sign() == sign, WEIGHT, 0.0) for v in weighted])
    mean = torch.where(divisor > 0, sum_of(agreeing) / divisor.clamp(min=WEIGHT), 0.0)
    return base + mean, scale, clear


def sum_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their sum."""
    total = torch.zeros_like(tensors[0])
    for tensor in tensors:
        total = total + tensor
    return total


def _trimmed(vector: torch.Tensor) -> torch.Tensor:
    kept = math.floor(DENSITY * vector.numel())
    threshold = vector.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(vector.abs() >= threshold, vector, 0.0)


def _slerp(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    if abs(cosine) > 0.9995:
        return (1 - T) * one + T * two
    angle = math.acos(cosine)
    return (math.sin((1 - T) * angle) * one + math.sin(T * angle) * two) / math.sin(angle)


def _wrong_dare(inputs: Sequence[torch.Tensor], merged: torch.Tensor) -> int:
    """Masks are random, so: no element is farther out than all vectors kept, and the share of those left alone fits.

    Where every vector is big enough to show, an element is the base's if and only if no model kept it.
    """
    base, *tuned = inputs
    vectors = [x - base for x in tuned]
    reach = sum_of([v.abs() for v in vectors]) * WEIGHT / DENSITY
    wrong = int((~((merged - base).abs() <= reach + 2 * HALF_UNIT * (base.abs() + reach))).sum())
    smallest = torch.stack([v.abs() for v in vectors]).amin(0) * WEIGHT / DENSITY
    telling = smallest > 4 * HALF_UNIT * base.abs()
    count = int(telling.sum())
    share = (1 - DENSITY) ** len(vectors)
    left = int((merged == base)[telling].sum())
    if count and abs(left - share * count) > SIGMAS * math.sqrt(share * (1 - share) * count) + 1:
        return max(wrong, count)
    return wrong
