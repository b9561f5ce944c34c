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
    on_base: bool = False
    """Whether the base is given where it is optional."""

    @property
    def is_whole(self) -> bool:
        """Whether the tensor is merged as a whole, not by a formula."""
        whole = self.method.whole
        return whole is not None and whole(self.parameters, self.models) is not None

    @property
    def keys(self) -> tuple[int, ...]:
        return tuple(mask_key(11, index, "w") for index in range(len(self.models)))

    @property
    def has_base(self) -> bool:
        return self.method.base == "required" or self.on_base


def case(name: str, models: list[dict[str, Any]], on_base: bool = False, **parameters: Any) -> Case:
    method = METHODS[name]
    own = tuple(method.model_parameters(**model) for model in models)
    return Case(method, method.parameters(**parameters), own, on_base)


THREE = [{"weight": 0.7, "density": 0.3}, {"weight": -0.4, "density": 0.05}, {"weight": 1.3, "density": 1.0}]
SIXTEEN = [{"weight": 0.1 * index - 0.25, "density": (index + 1) / 16} for index in range(16)]
PAPER = {"trim_scope": "tensor", "keep_count": "paper", "zero_sign": "majority", "divisor": "count"}
COUNTED = {"equal_magnitudes": "exact_k", "keep_count": "mergekit"}
MERGEKIT = {"keep_count": "mergekit", "equal_magnitudes": "exact_k", "divisor": "weights"}

CHANCED = [
    {"weight": 0.7, "density": 0.5},
    {"weight": -0.4, "density": 0.2, "epsilon": 0.1},
    {"density": 1.0},
]
BANDED = [
    {"weight": 0.7, "density": 0.5, "gamma": 0.1},
    {"weight": -0.4, "density": 0.05, "gamma": 0.3},
    {"density": 1.0},
]

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
    "passthrough, scaled": case("passthrough", [{"scale": -0.7}]),
    "nuslerp": case("nuslerp", [{"weight": 0.7}, {"weight": 0.4}]),
    "nuslerp of task vectors": case("nuslerp", [{"weight": 0.7}, {"weight": 0.4}], on_base=True),
    "nuslerp, rows": case("nuslerp", [{"weight": 1}, {"weight": 3}], on_base=True, nuslerp_flatten=False),
    "nuslerp, columns": case(
        "nuslerp", [{"weight": 1}, {"weight": 3}], nuslerp_flatten=False, nuslerp_row_wise=True
    ),
    "multislerp": case("multislerp", [{"weight": 0.3}, {"weight": 0.5}, {"weight": 0.4}]),
    "multislerp of task vectors": case("multislerp", [{}] * 4, on_base=True),
    "karcher": case("karcher", [{}] * 3),
    "della": case("della", CHANCED),
    "della as the paper": case("della", CHANCED, chances="width", divisor="count"),
    "della_linear, norm matched": case("della_linear", CHANCED, rescale="l1", normalize=True, lambda_=0.7),
    "della_linear, dense": case("della_linear", [{"density": 1.0}, {"density": 0.0}, {"weight": 0.4}]),
    "breadcrumbs": case("breadcrumbs", BANDED, lambda_=0.8),
    "breadcrumbs as mergekit": case("breadcrumbs", BANDED, band_count="mergekit", normalize=True),
    "breadcrumbs_ties": case("breadcrumbs_ties", BANDED, normalize=True),
    "sce": case("sce", [{}] * 3),
    "sce, selected": case("sce", [{}] * 4, select_topk=0.2),
    "sce as mergekit": case("sce", [{}] * 3, select_topk=0.5, small_energies="equal"),
    "ram": case("ram", [{}] * 3, epsilon=1e-3),
    "ramplus_tl": case("ramplus_tl", [{}] * 3, epsilon=1e-3, r=0.5, alpha=2.0),
    "ramplus_tl of the whole model": case("ramplus_tl", [{}] * 3, epsilon=1e-3, count_scope="model"),
    "consensus": case("consensus", [{"weight": 0.5}, {}, {"mask_lambda": 0.6}], agreement=2, lambda_=0.5),
    "tsv": case("tsv", [{"weight": 0.5}, {}, {}], lambda_=0.8),
    "knots": case("knots", [{"weight": 0.5}, {"density": 0.5}, {}]),
    "fisher": case("fisher", [{"weight": 0.5}, {}, {"weight": 2}]),
    "fisher with a floor": case("fisher", [{}, {}], floor=1e-3),
    "fisher_ties": case("fisher_ties", THREE, lambda_=0.9),
    "fisher_ties, dense": case("fisher_ties", [{}, {"density": 0.0}, {"weight": 0.5}], floor=1e-6),
    "fisher_ties, exactly so many": case("fisher_ties", THREE, **COUNTED),
    "regmean": case("regmean", [{"weight": 0.5}, {}, {"weight": 2}]),
    "regmean, transposed": case("regmean", [{}, {}], alpha=1, fan_in_fan_out=True),
    "model_stock": case("model_stock", [{}] * 3),
    "model_stock, rows": case("model_stock", [{}] * 3, filter_wise=True),
    "nearswap": case("nearswap", [{}], t=5e-4),
    "arcee_fusion": case("arcee_fusion", [{}]),
}


def statistics(of: Case, shape: tuple[int, ...], seed: int = 1) -> tuple[torch.Tensor, ...]:
    """What the method takes beside tensors of this shape: of a Fisher's small squares many are zero."""
    kind, generator = of.method.statistic, np.random.default_rng(seed)
    wanted = None if kind is None else kind.shape(of.parameters, shape)
    if kind is None or wanted is None:
        return ()
    found = []
    for _ in of.models:
        drawn = generator.normal(0, 1e-3, wanted).astype(np.float32)
        if kind.name == "gram":
            made = drawn @ drawn.T
        else:
            made = np.asarray(drawn * drawn * (generator.random(wanted) < 0.7), dtype=np.float32)
        found.append(torch.from_numpy(made))
    return tuple(found)


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
