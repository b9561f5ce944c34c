"""What a merge method is.

A method is a frozen description and pure functions of parameters: which :class:`Formula` merges a tensor, and
which passes must have seen the whole of it before. It sees no elements, names, paths, devices or jobs; what a
formula computes is the kernels' affair (:mod:`workers.kernels.base`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from workers.kernels.base import Formula, Kernels, Operands, Term
from workers.task import SURVEY_ELEMENTS, Facts, JSONValue

Summary = JSONValue
"""What one survey pass found on some blocks: small JSON, combined exactly, however grouped and ordered."""


SurveyScope = Literal["tensor", "model"]


class Parameters(BaseModel):
    """Base of every method's parameters: frozen, unknown names refused, ``lambda`` spelled as papers do.

    A field's docstring is its description in the JSON schema, and so in ``GET /v1/methods`` and docs/methods.md: it
    tells users what each value means.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        populate_by_name=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @property
    def survey_scope(self) -> SurveyScope:
        """What a survey sees before it is concluded: each tensor by itself, or all of the model's.

        In a model's survey the same passes run over all tensors, are concluded once, on the number of all
        elements, and every tensor is merged with the same facts.
        """
        return "tensor"


Terms = Callable[[Facts], tuple[Term, ...]]
"""``facts -> a term for each model``, in the recipe's order: what one step of a method hands to the next."""


class SurveyPass(ABC):
    """One pass over all elements of a tensor, or of a model. Immutable; holds its parameters."""

    def needed(self, facts: Facts) -> bool:
        """Whether this has something to find, given what the passes before it found."""
        return True

    def at_once(self, kernels: Kernels, operands: Operands, facts: Facts) -> Facts | None:
        """What this pass adds to the facts, and maybe later ones would, where all that is surveyed is one whole tensor.

        ``None``, as by default: there is no quicker way than to accumulate, combine and conclude.
        """
        return None

    @abstractmethod
    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        """The statistic of one run of elements; ``facts`` are those of the passes before."""

    @abstractmethod
    def combine(self, summaries: Sequence[Summary]) -> Summary:
        """One summary for several; exact, so that grouping and order do not matter."""

    @abstractmethod
    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        """What this pass adds to the facts, given the summary of all ``numel`` > 0 elements."""


class BlockwisePass(SurveyPass):
    """A pass whose summary maps the number of each survey block to what was found there.

    Blocks are numbered within a tensor, so it has no place in a survey of the whole model.
    """

    @abstractmethod
    def per_block(self, kernels: Kernels, operands: Operands, facts: Facts) -> Sequence[JSONValue]:
        """What was found in each block of a run."""

    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        found = enumerate(self.per_block(kernels, operands, facts), operands.first // SURVEY_ELEMENTS)
        return {str(number): value for number, value in found}

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return {number: value for summary in summaries for number, value in summary.items()}


SurveyFunction = Callable[[Any, Sequence[Any]], tuple[SurveyPass, ...]]
"""``(parameters, model parameters) -> passes``; no passes when these parameters need none."""

FormulaFunction = Callable[[Any, Sequence[Any], Facts], Formula]
"""``(parameters, model parameters, facts) -> formula``, given what all passes found."""


@dataclass(frozen=True)
class Method:
    """A merge method: its name, parameters, survey and formula."""

    name: str
    """Its name in a recipe's ``merge_method``."""
    summary: str
    """One sentence for people."""
    paper: str
    """arXiv id or other source of its definition."""
    parameters: type[Parameters]
    """Global parameters."""
    model_parameters: type[Parameters]
    """Parameters of each model; a recipe may also give them globally, as the models' default."""
    formula: FormulaFunction
    """The mathematics."""
    survey: SurveyFunction = lambda parameters, models: ()
    """The passes that must have seen the whole tensor before there is a formula."""
    base: Literal["required", "first_model", "none"] = "none"
    """Whether a base model is required, is one of the two models (SLERP), or has no part in it."""
    min_models: int = 1
    """Fewest models, the base not counted (for ``first_model``: counted)."""
    max_models: int | None = None
    """Most models; ``None`` is any number."""
    profiles: Mapping[str, Mapping[str, JSONValue]] = field(default_factory=dict)
    """Parameter defaults under a named profile (``paper``, ``mergekit``); what the recipe sets wins."""
    copies: bool = False
    """Whether the output is the first model's own bytes when the dtype stays (passthrough)."""
