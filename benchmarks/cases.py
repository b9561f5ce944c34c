"""The merges that are measured, as recipes that mergekit reads too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.inputs import BASE, TUNES

Recipe = dict[str, Any]

METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_ties")
SEED = 0
WEIGHT = 0.5
DENSITY = 0.5
T = 0.4
"""SLERP's interpolation factor."""


@dataclass(frozen=True, slots=True)
class Case:
    """One merge of one size of inputs."""

    method: str
    """Merge method."""
    tunes: tuple[str, ...]
    """The fine-tunes that are merged."""

    @property
    def models(self) -> tuple[str, ...]:
        """All models that are read, in the order in which the first to be named comes first."""
        return self.tunes if self.method == "linear" else (BASE, *self.tunes)

    def recipe(self, place: Callable[[str], str]) -> Recipe:
        """The recipe, with every model where ``place`` says."""
        if self.method == "slerp":
            listed: list[Recipe] = [{"model": place(name)} for name in self.models]
        else:
            own = {"weight": WEIGHT}
            if self.method in ("ties", "dare_ties"):
                own["density"] = DENSITY
            listed = [{"model": place(name), "parameters": own} for name in self.tunes]
        recipe: Recipe = {"merge_method": self.method, "models": listed, "dtype": "bfloat16"}
        if self.method != "linear":
            recipe["base_model"] = place(BASE)
        if self.method == "slerp":
            recipe["parameters"] = {"t": T}
        return recipe


def case(method: str, tunes: int) -> Case:
    """The merge of ``tunes`` fine-tunes by a method; SLERP is between two models, the base and one."""
    return Case(method, TUNES[:1] if method == "slerp" else TUNES[:tunes])
