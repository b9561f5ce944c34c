"""DARE's step (2311.03099): drop elements at random and rescale the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from workers.kernels.base import Formula, Kernels, Operands, Term
from workers.kernels.scalars import keep_bound
from workers.methods.base import BlockwisePass, Summary, SurveyPass
from workers.methods.common import Rescale
from workers.task import Facts, JSONValue

SMALL_NORM = 1e-7
"""Below this L1 norm after the drop, matching norms leaves the vector as it is."""


@dataclass(frozen=True, slots=True)
class Drop:
    """How the models' task vectors are dropped and rescaled."""

    source: tuple[Term, ...]
    """What is dropped: a term for each model."""
    densities: tuple[float, ...]
    """The fraction of each that is kept."""
    rescale: Rescale
    """Divide by the density, match the L1 norm before the drop, or leave as it is."""

    @property
    def drawn(self) -> tuple[bool, ...]:
        """Which models have a mask to draw: those that neither keep all nor nothing."""
        return tuple(0 < density < 1 for density in self.densities)

    def passes(self) -> tuple[SurveyPass, ...]:
        """The pass that measures norms; none unless they are to be matched."""
        return (Norms(self),) if self.rescale == "l1" and any(self.drawn) else ()

    def terms(self, facts: Facts) -> tuple[Term, ...]:
        """The dropped and rescaled terms."""
        factors = facts["drop_factor"] if self.passes() else self._factors()
        return tuple(
            replace(term, factor=factor) for term, factor in zip(self.masked(), factors, strict=True)
        )

    def masked(self) -> tuple[Term, ...]:
        """The dropped terms, not yet rescaled."""
        return tuple(
            replace(term, keep_below=keep_bound(density))
            for term, density in zip(self.source, self.densities, strict=True)
        )

    def _factors(self) -> list[float]:
        return [
            1 / density if drawn and self.rescale == "inverse" else 1.0
            for density, drawn in zip(self.densities, self.drawn, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Norms(BlockwisePass):
    """The L1 norm of each task vector before and after its drop. Adds ``drop_factor``: per model.

    A block has ``[before, after]`` of each model, null for one without a mask.
    """

    drop: Drop
    """What is measured."""

    def per_block(self, kernels: Kernels, operands: Operands, facts: Facts) -> Sequence[JSONValue]:
        drawn = self.drop.drawn
        terms = tuple(term for term in self.drop.masked() if drawn[term.model])
        blocks = kernels.norms(operands, Formula(terms, task_vectors=True)).tolist()
        return [[norms.pop(0) if wanted else None for wanted in drawn] for norms in blocks]

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        factors = []
        for model, drawn in enumerate(self.drop.drawn):
            factor = 1.0
            if drawn:
                before, after = (
                    math.fsum(sums[model][which] for sums in summary.values()) for which in (0, 1)
                )
                if after >= SMALL_NORM:
                    factor = before / after
            factors.append(factor)
        return {"drop_factor": factors}
