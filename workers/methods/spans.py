"""What methods share that turn models as vectors, each tensor one: their dot products, and sums with coefficients.

Whatever such a method does stays in the span of its vectors, so the coefficients follow from all dot products alone:
one survey pass, and then a weighted sum. All of it is plain Python and float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.kernels.base import Formula, Kernels, Operands, Term
from workers.kernels.scalars import slerp_weights, stock_ratio
from workers.methods.base import BlockwisePass, Summary
from workers.task import Facts, JSONValue

Gram = Sequence[Sequence[float]]
"""The dot products of all pairs of vectors."""

Solve = Callable[[Gram], Sequence[float]]
"""What multiplies each vector, given the dot products."""


@dataclass(frozen=True, slots=True)
class DotProducts(BlockwisePass):
    """The dot products of all pairs of vectors. Adds ``coefficients``: what each is multiplied by."""

    models: int
    """How many there are."""
    task_vectors: bool | None
    """Whether vectors are task vectors; ``None``: where there is a base."""
    solve: Solve
    """What follows from them."""

    def per_block(self, kernels: Kernels, operands: Operands, facts: Facts) -> Sequence[JSONValue]:
        formula = Formula(tuple(Term(model) for model in range(self.models)), self.task_vectors)
        sums: list[list[float]] = kernels.products(operands, formula, _pairs(self.models)).tolist()
        return sums

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        gram = [[0.0] * self.models for _ in range(self.models)]
        for (one, two), column in zip(_pairs(self.models), zip(*summary.values(), strict=True), strict=True):
            gram[one][two] = gram[two][one] = math.fsum(column)
        return {"coefficients": list(self.solve(gram))}


def combination(facts: Facts, task_vectors: bool | None) -> Formula:
    """The vectors' sum with those coefficients."""
    terms = tuple(Term(model, coefficient) for model, coefficient in enumerate(facts["coefficients"]))
    return Formula(terms, task_vectors)


def norms_of(gram: Gram) -> list[float]:
    """The vectors' lengths."""
    return [math.sqrt(gram[model][model]) for model in range(len(gram))]


def cosine(gram: Gram, one: int, two: int) -> float:
    """Of the angle between two vectors; 0 where one is zero."""
    lengths = math.sqrt(gram[one][one]) * math.sqrt(gram[two][two])
    return max(-1.0, min(1.0, gram[one][two] / lengths)) if lengths > 0 else 0.0


def turned(gram: Gram, t: float) -> tuple[float, float]:
    """What NuSLERP multiplies two vectors by: those of SLERP, a zero vector being at right angles to any."""
    return slerp_weights(t, math.acos(cosine(gram, 0, 1)))


def spherical_mean(gram: Gram, weights: Sequence[float]) -> list[float]:
    """The weighted mean's direction on the sphere, at the weighted mean of the lengths.

    Each vector of length 1, their weighted sum, as long as the lengths' weighted sum. Where that sum vanishes, as of
    opposite vectors, the vectors' plain weighted sum.
    """
    if len(weights) == 1:
        return [1.0]
    norms = norms_of(gram)
    units = [weight / norm if norm > 0 else 0.0 for weight, norm in zip(weights, norms, strict=True)]
    length = math.sqrt(max(0.0, _square(gram, units)))
    if length <= _VANISHING * math.fsum(map(abs, weights)):
        return list(weights)
    wanted = math.fsum(weight * norm for weight, norm in zip(weights, norms, strict=True))
    return [wanted / length * unit for unit in units]


def karcher_mean(gram: Gram, max_iter: int, tol: float) -> list[float]:
    """The Karcher mean of the directions (Karcher 1977), at the mean of the lengths; zero vectors have no direction.

    Begins at the directions' mean, and goes along the mean of the tangents to them until that is shorter than
    ``tol``. Where the mean of the directions vanishes it begins at the first.
    """
    norms = norms_of(gram)
    count = sum(norm > 0 for norm in norms)
    if not count:
        return [0.0] * len(norms)
    units = [1 / norm if norm > 0 else 0.0 for norm in norms]
    mean = [unit / count for unit in units]
    length = math.sqrt(max(0.0, _square(gram, mean)))
    if length <= _VANISHING:
        first = next(model for model, norm in enumerate(norms) if norm > 0)
        mean, length = [unit if model == first else 0.0 for model, unit in enumerate(units)], 1.0
    mean = [share / length for share in mean]
    for _ in range(max_iter):
        step = _tangent(gram, units, mean, count, tol)
        length = math.sqrt(max(0.0, _square(gram, step)))
        if length < tol:
            break
        go, turn = math.cos(length), math.sin(length) / length
        mean = [go * share + turn * more for share, more in zip(mean, step, strict=True)]
    return [math.fsum(norms) / len(norms) * share for share in mean]


def _tangent(
    gram: Gram, units: Sequence[float], mean: Sequence[float], count: int, tol: float
) -> list[float]:
    """The mean of the tangents at ``mean`` that lead to each direction, as coefficients."""
    shares = []
    back = 0.0
    for row, unit in zip(gram, units, strict=True):
        along = math.fsum(dot * share for dot, share in zip(row, mean, strict=True)) * unit
        angle = math.acos(max(-1.0, min(1.0, along)))
        far = angle > tol and math.sin(angle) > _VANISHING and unit > 0
        share = angle / math.sin(angle) / count if far else 0.0
        shares.append(share * unit)
        back += share * along
    return [share - back * at for share, at in zip(shares, mean, strict=True)]


def stock(gram: Gram) -> list[float]:
    """What Model Stock multiplies each task vector by."""
    models = len(gram)
    ratio = stock_ratio([cosine(gram, one, two) for one in range(models) for two in range(one)], models)
    return [ratio / models] * models


_VANISHING = 1e-8


def _square(gram: Gram, shares: Sequence[float]) -> float:
    """The squared length of a vector with these coefficients."""
    return math.fsum(
        one * two * dot
        for one, row in zip(shares, gram, strict=True)
        for two, dot in zip(shares, row, strict=True)
    )


def _pairs(models: int) -> list[tuple[int, int]]:
    return [(one, two) for one in range(models) for two in range(one + 1)]
