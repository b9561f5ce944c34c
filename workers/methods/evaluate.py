"""A method on whole tensors, or whole models, in memory: survey and merge in one call, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from workers.kernels.base import Kernels, Operands
from workers.kernels.torch_kernels import TorchKernels
from workers.methods.base import Method, Parameters, Tensors
from workers.methods.survey import survey, survey_all

TORCH: Kernels = TorchKernels()
"""What computes unless other kernels are given."""


def merge_tensor(
    method: Method,
    parameters: Parameters,
    models: Sequence[Parameters],
    base: torch.Tensor | None,
    inputs: Sequence[torch.Tensor],
    *,
    mask_keys: Sequence[int] = (),
    statistics: Sequence[torch.Tensor] = (),
    kernels: Kernels = TORCH,
) -> torch.Tensor:
    """Survey and merge one whole tensor in memory; it is all that the survey of a model sees.

    ``base`` and ``inputs`` are float32, bfloat16 or float16 and of one shape, which the merged float32 tensor
    has too; ``mask_keys`` (one a model) are only read by methods that drop at random, ``statistics`` (one a model)
    by those that have a :attr:`Method.statistic`.
    """
    bases = None if base is None else {"": base}
    named = [{"": tensor} for tensor in inputs]
    keys = {"": mask_keys}
    known = [{"": statistic} for statistic in statistics]
    return merge_tensors(
        method, parameters, models, bases, named, mask_keys=keys, statistics=known, kernels=kernels
    )[""]


def merge_tensors(
    method: Method,
    parameters: Parameters,
    models: Sequence[Parameters],
    bases: Mapping[str, torch.Tensor] | None,
    inputs: Sequence[Mapping[str, torch.Tensor]],
    *,
    mask_keys: Mapping[str, Sequence[int]] | None = None,
    statistics: Sequence[Mapping[str, torch.Tensor]] = (),
    kernels: Kernels = TORCH,
) -> dict[str, torch.Tensor]:
    """Survey and merge whole models in memory: tensors by name, each as in :func:`merge_tensor`."""
    whole = None if method.whole is None else method.whole(parameters, models)
    passes = () if whole else method.survey(parameters, models)
    tensors = {
        name: Operands(
            first=0,
            base=None if bases is None else bases[name].reshape(-1),
            models=tuple(model[name].reshape(-1) for model in inputs),
            mask_keys=tuple((mask_keys or {}).get(name, ())),
            statistics=tuple(statistic[name].reshape(-1) for statistic in statistics),
        )
        for name, first in inputs[0].items()
        if first.numel()
    }
    shared = None
    if tensors and parameters.survey_scope == "model":
        shared = survey_all(passes, list(tensors.values()), kernels)
    merged = {}
    for name, like in inputs[0].items():
        if whole and like.numel():
            base = None if bases is None else bases[name]
            keys = tuple((mask_keys or {}).get(name, ()))
            vectors = tensors[name].statistics
            merged[name] = whole.merge(Tensors(base, tuple(model[name] for model in inputs), keys, vectors))
            continue
        merged[name] = torch.empty(like.shape, dtype=torch.float32, device=like.device)
        if name in tensors:
            facts = survey(passes, tensors[name], kernels) if shared is None else shared
            formula = method.formula(parameters, models, facts)
            kernels.merge(tensors[name], formula, merged[name].view(-1))
    return merged
