"""DARE's step (2311.03099): drop elements at random and rescale the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workers.kernels import reference
from workers.methods.base import Block, Summary, SurveyPass
from workers.methods.common import Rescale, task_vectors
from workers.random import keep_mask
from workers.task import SURVEY_ELEMENTS, Facts

SMALL_NORM = 1e-7
"""Below this L1 norm after the drop, matching norms leaves the vector as it is."""


@dataclass(frozen=True, slots=True)
class Drop:
    """How the models' task vectors are dropped and rescaled."""

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

    def vectors(self, block: Block, facts: Facts) -> list[torch.Tensor]:
        """The sparse task vectors of a block."""
        factors = facts["drop_factor"] if self.rescale == "l1" and any(self.drawn) else self._factors()
        return [
            self._drop(block, model, vector, factors[model])
            for model, vector in enumerate(task_vectors(block))
        ]

    def _factors(self) -> list[float]:
        return [
            1 / density if drawn and self.rescale == "inverse" else 1.0
            for density, drawn in zip(self.densities, self.drawn, strict=True)
        ]

    def _drop(self, block: Block, model: int, vector: torch.Tensor, factor: float) -> torch.Tensor:
        if self.densities[model] >= 1:
            return vector
        return reference.drop(vector, self.mask(block, model), factor)

    def mask(self, block: Block, model: int) -> torch.Tensor:
        """Which elements of a block one model keeps: bool, shape ``[n]``."""
        vector = block.models[model]
        mask = keep_mask(block.mask_keys[model], block.first, vector.numel(), self.densities[model])
        return mask.to(vector.device)


@dataclass(frozen=True, slots=True)
class Norms(SurveyPass):
    """The L1 norm of each task vector before and after its drop. Adds ``drop_factor``: per model.

    A summary maps the block's number to ``[before, after]`` of each model, null for one without a mask.
    """

    drop: Drop
    """The densities."""

    def summarise(self, block: Block, facts: Facts) -> Summary:
        sums: list[list[float] | None] = []
        for model, vector in enumerate(task_vectors(block)):
            if not self.drop.drawn[model]:
                sums.append(None)
                continue
            finite = reference.finite_or_zero(vector)
            kept = reference.drop(finite, self.drop.mask(block, model), 1.0)
            sums.append([reference.block_sum(x.abs().double()) for x in (finite, kept)])
        return {str(block.first // SURVEY_ELEMENTS): sums}

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return {number: sums for summary in summaries for number, sums in summary.items()}

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
