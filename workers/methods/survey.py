"""Running a method's passes: no I/O.

A worker that has a whole tensor uses ``survey`` and the method's ``formula``; one that sees only a piece of it uses
a pass' ``accumulate``, and whoever gathers the pieces uses ``conclude_pass``.
"""

from __future__ import annotations

from collections.abc import Sequence

from workers.kernels.base import Kernels, Operands
from workers.methods.base import Summary, SurveyPass
from workers.task import Facts

_HELD_SUMMARIES = 8
"""Summaries of a survey that wait to be combined, at most: of 16 models they may have 2 MB each."""


def conclude_pass(survey_pass: SurveyPass, summaries: Sequence[Summary], numel: int, facts: Facts) -> Facts:
    """The facts after a pass, given the summaries of all pieces of what is surveyed, in any order."""
    return facts | survey_pass.conclude(survey_pass.combine(summaries), numel, facts)


def next_pass(passes: Sequence[SurveyPass], number: int, facts: Facts) -> int:
    """The first pass from ``number`` on that is needed, given the facts so far; ``len(passes)`` when none is."""
    return next((at for at in range(number, len(passes)) if passes[at].needed(facts)), len(passes))


class Tally:
    """The summaries of a pass, combined as they come, a few at a time: so few are held, and each is opened once."""

    def __init__(self, survey_pass: SurveyPass) -> None:
        self._pass = survey_pass
        self._summaries: list[Summary] = []

    def add(self, summary: Summary) -> None:
        """Take in one more."""
        self._summaries.append(summary)
        if len(self._summaries) > _HELD_SUMMARIES:
            self._summaries = [self.total]

    @property
    def total(self) -> Summary:
        """One summary for all that came, of at least one."""
        return self._pass.combine(self._summaries)


def survey(passes: Sequence[SurveyPass], operands: Operands, kernels: Kernels) -> Facts:
    """All that ``passes`` find out about a whole tensor, of at least one element."""
    return survey_all(passes, [operands], kernels)


def survey_all(passes: Sequence[SurveyPass], tensors: Sequence[Operands], kernels: Kernels) -> Facts:
    """All that ``passes`` find out about several whole tensors together, of at least one element."""
    numel = sum(tensor.numel for tensor in tensors)
    facts: Facts = {}
    for survey_pass in passes:
        if not survey_pass.needed(facts):
            continue
        found = survey_pass.at_once(kernels, tensors[0], facts) if len(tensors) == 1 else None
        if found is None:
            summaries = [survey_pass.accumulate(kernels, tensor, facts) for tensor in tensors]
            facts = conclude_pass(survey_pass, summaries, numel, facts)
        else:
            facts = facts | found
    return facts
