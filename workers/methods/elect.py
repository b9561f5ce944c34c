"""TIES' second and third step as methods use them: elect signs, merge what agrees, add it to the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workers.kernels.base import Divisor, Election, Formula, Kernels, Operands, Term
from workers.methods.base import Summary, SurveyPass, Terms
from workers.methods.common import TaskVectorParameters, ZeroSign
from workers.task import Facts


class ElectingParameters(TaskVectorParameters):
    """Global parameters of the methods that elect a sign."""

    normalize: bool = False
    """Whether the sum of what agrees with the elected sign is divided, by what `divisor` says."""
    zero_sign: ZeroSign = "positive"
    """The sign elected where the weighted sum is exactly zero: `positive`, or the one that the `majority` of the
    elements elect, of the tensor or of the model as `trim_scope` says (negative on a tie)."""
    divisor: Divisor = "abs_weights"
    """What `normalize` divides by, over the models that agree: `abs_weights`, the sum of their absolute weights;
    `weights`, the sum of their weights (1 where that vanishes); `count`, their number."""


@dataclass(frozen=True, slots=True)
class ElectedSigns(SurveyPass):
    """The balance of the elected signs. Adds ``zero_sign``: 1, or -1 on a tie as the authors do. Not needed when an
    earlier pass could tell.

    A summary is the number of elements that elect ``+`` less those that elect ``-``.
    """

    terms: Terms
    """The terms that elect."""

    def needed(self, facts: Facts) -> bool:
        return "zero_sign" not in facts

    def accumulate(self, kernels: Kernels, operands: Operands, facts: Facts) -> Summary:
        return kernels.elected(operands, Formula(self.terms(facts), task_vectors=True))

    def combine(self, summaries: Sequence[Summary]) -> Summary:
        return sum(summaries)

    def conclude(self, summary: Summary, numel: int, facts: Facts) -> Facts:
        return {"zero_sign": 1 if summary > 0 else -1}


def consensus(terms: tuple[Term, ...], parameters: ElectingParameters, facts: Facts) -> Formula:
    """The base plus lambda times the consensus of sparse task vectors."""
    election = Election(
        zero_sign=facts["zero_sign"] if parameters.zero_sign == "majority" else 1,
        divisor=parameters.divisor if parameters.normalize else None,
    )
    return Formula(terms, task_vectors=True, election=election, lambda_=parameters.lambda_)
