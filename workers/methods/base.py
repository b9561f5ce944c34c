"""What a merge method is.

A method is a frozen description and pure functions of float32 tensors. It sees no names, paths, devices or
jobs. All tensors of a :class:`Block` are float32, one-dimensional and of equal length; rounding to the
output dtype, reading, splitting and the handling of non-finite input are done by the caller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from workers.task import Facts, JSONValue

Summary = JSONValue
"""What one survey pass found on some blocks: small JSON, combined exactly, however grouped and ordered."""


class Parameters(BaseModel):
    """Base of every method's parameters: frozen, unknown names refused, ``lambda`` spelled as papers do."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Block:
    """A run of at most ``SURVEY_ELEMENTS`` elements of one tensor, from every input, in float32."""

    first: int
    """Flat index, within the tensor, of the first element; a multiple of ``SURVEY_ELEMENTS``."""
    base: torch.Tensor | None
    """The base model's elements, shape ``[n]``; ``None`` for methods without a base."""
    models: tuple[torch.Tensor, ...]
    """The models' elements, each of shape ``[n]``, in the recipe's order."""
    mask_keys: tuple[int, ...]
    """A 64-bit Philox key per model, from seed, model index and tensor name."""


_FOLD = 16
"""Summaries gathered before they are combined: bounds what a pass holds, whatever the tensor's size."""


class SurveyPass(ABC):
    """One pass over all blocks of a tensor. Immutable; holds its parameters."""

    @abstractmethod
    def summarise(self, block: Block, facts: Facts) -> Summary:
        """The statistic of one block; ``facts`` are those of the passes before."""

    def accumulate(self, blocks: Iterable[Block], facts: Facts) -> Summary:
        """The statistic of one or more blocks: their summaries, combined.

        A pass whose summaries are big overrides this, to count in place what it need not write out a block.
        """
        summaries: list[Summary] = []
        for block in blocks:
            summaries.append(self.summarise(block, facts))
            if len(summaries) == _FOLD:
                summaries = [self.combine(summaries)]
        return self.combine(summaries)

    @abstractmethod
    def combine(self, summaries: Sequence[Summary]) -> Summary:
        """One summary for several; exact, so that grouping and order do not matter."""

    @abstractmethod
    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        """What this pass adds to the facts, given the whole tensor's summary (``numel`` > 0)."""


SurveyFunction = Callable[[Any, Sequence[Any]], tuple[SurveyPass, ...]]
"""``(parameters, model parameters) -> passes``; no passes when these parameters need none."""

MergeFunction = Callable[[Block, Any, Sequence[Any], Facts], torch.Tensor]
"""``(block, parameters, model parameters, facts) -> merged float32 elements``, shape ``[n]``."""


@dataclass(frozen=True)
class Method:
    """A merge method: its name, parameters, survey and pure merge function."""

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
    merge: MergeFunction
    """The mathematics."""
    survey: SurveyFunction = lambda parameters, models: ()
    """The passes that must have seen the whole tensor before any element is merged."""
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
