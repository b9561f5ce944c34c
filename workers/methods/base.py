"""What a merge method is.

A method is a frozen description and pure functions of parameters: which :class:`Formula` merges a tensor, and
which passes must have seen the whole of it before. It sees no elements, names, paths, devices or jobs; what a
formula computes is the kernels' affair (:mod:`workers.kernels.base`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from workers.kernels.base import Formula, Kernels, Operands, Term
from workers.task import SURVEY_ELEMENTS, Facts, JSONValue

if TYPE_CHECKING:  # whoever only plans needs no torch
    import torch

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


@dataclass(frozen=True, slots=True)
class Tensors:
    """One whole tensor from every input, in their own dtypes and in its shape."""

    base: torch.Tensor | None
    """The base model's, for methods that have one."""
    models: tuple[torch.Tensor, ...]
    """The models', in the recipe's order."""
    mask_keys: tuple[int, ...]
    """As :class:`workers.kernels.base.Operands` has them."""
    statistics: tuple[torch.Tensor, ...] = ()
    """Of each model what :attr:`Method.statistic` says, as a vector; empty for methods that take none."""


@dataclass(frozen=True, slots=True)
class Whole:
    """How a tensor is merged of which no part can be merged without the rest, and not by an elementwise formula."""

    merge: Callable[[Tensors], torch.Tensor]
    """The merged float32 tensor, in the shape of the inputs; the inputs are left alone."""
    bytes_per_element: int
    """Workspace bytes for each element of the tensor, the inputs and the output not counted."""
    bytes_per_statistic: int = 0
    """Workspace bytes for each element of one model's statistic, beside those for the tensor's."""


WholeFunction = Callable[[Any, Sequence[Any]], Whole | None]
"""``(parameters, model parameters) -> how``; ``None`` where these parameters leave it to the formula."""

SurveyFunction = Callable[[Any, Sequence[Any]], tuple[SurveyPass, ...]]
"""``(parameters, model parameters) -> passes``; no passes when these parameters need none."""

FormulaFunction = Callable[[Any, Sequence[Any], Facts], Formula]
"""``(parameters, model parameters, facts) -> formula``, given what all passes found."""


StatisticName = Literal["fisher", "gram"]
"""The keys of a recipe's models that name a checkpoint of statistics."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """What a method has to know of each model's data: a checkpoint beside the model's, of tensors with its names."""

    name: StatisticName
    """The key that names it, beside a recipe's ``model``."""
    shape: Callable[[Any, tuple[int, ...]], tuple[int, ...] | None]
    """``(parameters, shape of the model's tensor) -> shape of its statistic``; ``None`` where it can have none."""
    without: str | None = None
    """The method of tensors that no model has a statistic of, given the parameters that it shares; ``None``: none."""
    is_sparse: bool = False
    """Whether it is no lack that tensors have none."""


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
    whole: WholeFunction | None = None
    """How whole tensors are merged, for methods that are not always elementwise once surveyed; those tensors are kept
    in one part, whatever their size, and priced as such."""
    statistic: Statistic | None = None
    """What it has to know of each model besides its weights; a formula's terms read it element by element."""
    base: Literal["required", "optional", "first_model", "none"] = "none"
    """Whether a base model is required, makes task vectors of models where it is given, is one of the two models
    (SLERP), or has no part in it."""
    min_models: int = 1
    """Fewest models, the base not counted (for ``first_model``: counted)."""
    max_models: int | None = None
    """Most models; ``None`` is any number."""
    profiles: Mapping[str, Mapping[str, JSONValue]] = field(default_factory=dict)
    """Parameter defaults under a named profile (``paper``, ``mergekit``); what the recipe sets wins."""
    copies: bool = False
    """Whether the output is the first model's own bytes when the dtype stays (passthrough), unless it is scaled."""
    reads_as: str = ""
    """The formula, for people; markdown with the names of the parameters."""
    example: Mapping[str, JSONValue] = field(default_factory=dict)
    """Parameters, global and the models', that have it do all of its steps; those without a default among them."""

    @property
    def typical_cost(self) -> tuple[int, int]:
        """The passes before the merge of a tensor that is split, and the workspace bytes for each element of one that
        is merged as a whole, under the parameters of :attr:`example`."""
        own, theirs = (
            {name: value for name, value in self.example.items() if name in _names(model)}
            for model in (self.parameters, self.model_parameters)
        )
        parameters = self.parameters.model_validate(own)
        models = [self.model_parameters.model_validate(theirs)] * max(2, self.min_models)
        models = models[: self.max_models]
        whole = None if self.whole is None else self.whole(parameters, models)
        return (0, whole.bytes_per_element) if whole else (len(self.survey(parameters, models)), 0)


def _names(model: type[Parameters]) -> set[str]:
    return {given.alias or name for name, given in model.model_fields.items()}
