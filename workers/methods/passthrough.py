"""Passthrough: one model as it is, its dtype maybe changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from workers.methods.base import Block, Method
from workers.methods.common import NO_PROFILE_DIFFERENCES, NoParameters
from workers.task import Facts


def merge(
    block: Block, parameters: NoParameters, models: Sequence[NoParameters], facts: Facts
) -> torch.Tensor:
    """The model itself."""
    return block.models[0]


PASSTHROUGH = Method(
    name="passthrough",
    summary="Copies one model.",
    paper="arXiv:2403.13257",
    parameters=NoParameters,
    model_parameters=NoParameters,
    merge=merge,
    max_models=1,
    profiles=NO_PROFILE_DIFFERENCES,
    copies=True,
)
