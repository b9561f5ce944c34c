"""Arcee Fusion: take the other model's elements where the change is important, and the base's elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workers.kernels.base import Formula
from workers.methods.base import Method, Tensors, Whole
from workers.methods.common import NO_PROFILE_DIFFERENCES, NoParameters, terms_alone
from workers.task import Facts

if TYPE_CHECKING:
    import torch


def whole(parameters: NoParameters, models: Sequence[NoParameters]) -> Whole:
    """The whole tensor at once: an element's importance is weighed by its row, and compared with all others."""

    def merge(tensors: Tensors) -> torch.Tensor:
        from workers.kernels.rows import fuse_rows  # noqa: PLC0415 - whoever only plans needs no torch

        if tensors.base is None:
            raise ValueError("task vectors need the base model's elements")
        return fuse_rows(tensors.base, tensors.models[0])

    return Whole(merge, 100)


def formula(parameters: NoParameters, models: Sequence[NoParameters], facts: Facts) -> Formula:
    """The other model, all of it: there are no parameters under which this is asked."""
    return Formula(terms_alone(1), task_vectors=True)


ARCEE_FUSION = Method(
    name="arcee_fusion",
    summary="Takes the other model's elements where their change stands out, and the base's elsewhere.",
    paper="mergekit's documentation; arcee.ai/blog/meet-mergekit-v0-1",
    parameters=NoParameters,
    model_parameters=NoParameters,
    formula=formula,
    whole=whole,
    base="required",
    max_models=1,
    profiles=NO_PROFILE_DIFFERENCES,
    reads_as="θ = θ₁ where s ≥ median(s) + 1.5·(q₃ − q₁), else θ_base; s = |τ| · KL(softmax(row of θ₁) ‖ softmax(row "
    "of θ_base)), and quartiles and median are the lower of two",
)
