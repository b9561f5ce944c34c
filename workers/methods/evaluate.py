"""Running a method over a tensor: no I/O.

``merge_tensor`` does the whole on tensors in memory. A worker that reads its elements from elsewhere uses
``survey`` and the method's ``formula``; one that sees only a piece of a tensor uses a pass' ``accumulate``,
and whoever gathers the pieces uses ``conclude_pass``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.kernels.base import Kernels, Operands
from workers.kernels.torch_kernels import TorchKernels
from workers.methods.base import Method, Parameters, Summary, SurveyPass
from workers.task import Facts

TORCH: Kernels = TorchKernels()
"""What computes unless other kernels are given."""


def conclude_pass(survey_pass: SurveyPass, summaries: Sequence[Summary], numel: int, facts: Facts) -> Facts:
    """The facts after a pass, given the summaries of all pieces of the tensor, in any order."""
    return facts | survey_pass.conclude(survey_pass.combine(summaries), numel, facts)


def survey(passes: Sequence[SurveyPass], operands: Operands, kernels: Kernels = TORCH) -> Facts:
    """All that ``passes`` find out about a whole tensor, of at least one element."""
    facts: Facts = {}
    for survey_pass in passes:
        summary = survey_pass.accumulate(kernels, operands, facts)
        facts = conclude_pass(survey_pass, [summary], operands.numel, facts)
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
    """Survey and merge one whole tensor in memory.

    ``base`` and ``inputs`` are float32, bfloat16 or float16 and of one shape, which the merged float32 tensor
    has too; ``mask_keys`` (one a model) are only read by methods that drop at random.
    """
    merged = torch.empty(inputs[0].shape, dtype=torch.float32, device=inputs[0].device)
    if merged.numel():
        operands = Operands(
            first=0,
            base=None if base is None else base.reshape(-1),
            models=tuple(model.reshape(-1) for model in inputs),
            mask_keys=tuple(mask_keys),
        )
        facts = survey(method.survey(parameters, models), operands, kernels)
        kernels.merge(operands, method.formula(parameters, models, facts), merged.view(-1))
    return merged
