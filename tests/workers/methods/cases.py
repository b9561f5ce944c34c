"""Every method under parameters that reach each of its branches, and tensors to merge.

A new method gets the whole contract suite by having its cases listed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workers.methods import METHODS
from workers.methods.base import Method, Parameters
from workers.random import mask_key
from workers.task import SURVEY_ELEMENTS

LONG = 2 * SURVEY_ELEMENTS + 37
"""Three blocks, the last one off every vector width."""

WIDE = 2 * 32768 + 37
"""Enough for torch to share it among threads, off every vector width."""


@dataclass(frozen=True)
class Case:
    """A method with parameters for each of its models."""

    method: Method
    parameters: Parameters
    models: tuple[Parameters, ...]

    @property
    def keys(self) -> tuple[int, ...]:
        return tuple(mask_key(11, index, "w") for index in range(len(self.models)))

    @property
    def has_base(self) -> bool:
        return self.method.base == "required"


def case(name: str, models: list[dict[str, Any]], **parameters: Any) -> Case:
    method = METHODS[name]
    return Case(
        method, method.parameters(**parameters), tuple(method.model_parameters(**model) for model in models)
    )


THREE = [{"weight": 0.7, "density": 0.3}, {"weight": -0.4, "density": 0.05}, {"weight": 1.3, "density": 1.0}]
SIXTEEN = [{"weight": 0.1 * index - 0.25, "density": (index + 1) / 16} for index in range(16)]
PAPER = {"trim_scope": "tensor", "keep_count": "paper", "zero_sign": "majority", "divisor": "count"}
MERGEKIT = {"keep_count": "mergekit", "equal_magnitudes": "exact_k", "divisor": "weights"}

CASES = {
    "linear": case("linear", [{"weight": 0.3}, {"weight": 0.5}, {"weight": -0.1}]),
    "linear, sixteen, not normalised": case(
        "linear", [{"weight": model["weight"]} for model in SIXTEEN], normalize=False
    ),
    "slerp": case("slerp", [{}, {}], t=0.3),
    "slerp at its end": case("slerp", [{}, {}], t=1),
    "task_arithmetic": case("task_arithmetic", [{"weight": 0.3}, {"weight": 0.8}], lambda_=0.7),
    "task_arithmetic, sixteen, normalised": case(
        "task_arithmetic", [{"weight": model["weight"]} for model in SIXTEEN], normalize=True
    ),
    "ties": case("ties", THREE, lambda_=1.1),
    "ties, sixteen": case("ties", SIXTEEN, zero_sign="majority"),
    "ties, dense": case("ties", [{}, {"density": 0.0}, {"weight": 0.5}], normalize=False),
    "ties as the paper": case("ties", THREE, **PAPER),
    "ties as mergekit": case("ties", THREE, **MERGEKIT),
    "dare_linear": case("dare_linear", THREE),
    "dare_linear, norm matched": case("dare_linear", THREE, rescale="l1", normalize=True),
    "dare_ties": case("dare_ties", THREE, normalize=True, lambda_=0.6),
    "dare_ties, sixteen": case("dare_ties", SIXTEEN, rescale="none"),
    "dare_ties as the paper": case("dare_ties", THREE, retrim=True, trim_density=0.1, **PAPER),
    "dare_ties, all steps": case(
        "dare_ties",
        THREE,
        rescale="l1",
        retrim=True,
        trim_density=0.02,
        zero_sign="majority",
        **MERGEKIT,
    ),
    "passthrough": case("passthrough", [{}]),
}


def tensors(
    of: Case, shape: int | tuple[int, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """A base, if the method has one, and fine-tunes as checkpoints hold them: equal deltas are common."""
    generator = np.random.default_rng(seed)  # torch's own normals depend on the instruction set

    def normal(sigma: float) -> torch.Tensor:
        return torch.from_numpy(np.asarray(generator.normal(0, sigma, shape), dtype=np.float32))

    base = normal(0.02).to(dtype)
    models = [(base.float() + normal(1e-3)).to(dtype) for _ in of.models]
    return (base if of.has_base else None), models
