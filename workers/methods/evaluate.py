"""Running a method over a tensor, or over all of a model's: no I/O.

``merge_tensor`` and ``merge_tensors`` do the whole on tensors in memory. A worker that reads its elements from
elsewhere uses ``survey`` and the method's ``formula``; one that sees only a piece of a tensor uses a pass'
``accumulate``, and whoever gathers the pieces uses ``conclude_pass``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from workers.kernels.base import Kernels, Operands
from workers.kernels.torch_kernels import TorchKernels
from workers.methods.base import Method, Parameters, Summary, SurveyPass
from workers.task import Facts

TORCH: Kernels = TorchKernels()
"""What computes unless other kernels are given."""

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


def survey(passes: Sequence[SurveyPass], operands: Operands, kernels: Kernels = TORCH) -> Facts:
    """All that ``passes`` find out about a whole tensor, of at least one element."""
    return survey_all(passes, [operands], kernels)


def survey_all(passes: Sequence[SurveyPass], tensors: Sequence[Operands], kernels: Kernels = TORCH) -> Facts:
    """All that ``passes`` find out about several whole tensors together, of at least one element."""
    numel = sum(tensor.numel for tensor in tensors)
    facts: Facts = {}
    for survey_pass in passes:
        if survey_pass.needed(facts):
            summaries = [survey_pass.accumulate(kernels, tensor, facts) for tensor in tensors]
            facts = conclude_pass(survey_pass, summaries, numel, facts)
    return facts


def merge_tensor(
    method: Method,
    parameters: Parameters,
    models: Sequence[Parameters],
    base: torch.Tensor | None,
    inputs: Sequence[torch.Tensor],
    *,
    mask_keys: Sequence[int] = (),
    kernels: Kernels = TORCH,
) -> torch.Tensor:
    """Survey and merge one whole tensor in memory; it is all that the survey of a model sees.

    ``base`` and ``inputs`` are float32, bfloat16 or float16 and of one shape, which the merged float32 tensor
    has too; ``mask_keys`` (one a model) are only read by methods that drop at random.
    """
    bases = None if base is None else {"": base}
    named = [{"": tensor} for tensor in inputs]
    keys = {"": mask_keys}
    return merge_tensors(method, parameters, models, bases, named, mask_keys=keys, kernels=kernels)[""]


def merge_tensors(
    method: Method,
    parameters: Parameters,
    models: Sequence[Parameters],
    bases: Mapping[str, torch.Tensor] | None,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    *,
    mask_keys: Mapping[str, Sequence[int]] | None = None,
    kernels: Kernels = TORCH,
) -> dict[str, torch.Tensor]:
    """Survey and merge whole models in memory: tensors by name, each as in :func:`merge_tensor`."""
    passes = method.survey(parameters, models)
    tensors = {
        name: Operands(
            first=0,
            base=None if bases is None else bases[name].reshape(-1),
            models=tuple(model[name].reshape(-1) for model in inputs),
            mask_keys=tuple((mask_keys or {}).get(name, ())),
        )
        for name, first in inputs[0].items()
        if first.numel()
    }
    shared = None
    if tensors and parameters.survey_scope == "model":
        shared = survey_all(passes, list(tensors.values()), kernels)
    merged = {}
    for name, like in inputs[0].items():
        merged[name] = torch.empty(like.shape, dtype=torch.float32, device=like.device)
        if name in tensors:
            facts = survey(passes, tensors[name], kernels) if shared is None else shared
            formula = method.formula(parameters, models, facts)
            kernels.merge(tensors[name], formula, merged[name].view(-1))
    return merged
