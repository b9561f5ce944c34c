"""An arithmetic, bound: the method and the parameters that a task names, ready to be called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from workers.kernels.base import Formula
from workers.methods import get_method
from workers.methods.base import Method, Parameters, SurveyPass, Whole
from workers.task import Arithmetic, Facts, canonical_json


@dataclass(frozen=True)
class BoundMethod:
    """A method with its parameters for one tensor."""

    method: Method
    """The method."""
    parameters: Parameters
    """Its global parameters."""
    models: Sequence[Parameters]
    """Each model's parameters."""
    passes: tuple[SurveyPass, ...]
    """The survey that these parameters need."""
    whole: Whole | None
    """How the whole tensor is merged, where no formula does it."""

    def formula(self, facts: Facts) -> Formula:
        """What merges the tensor that ``facts`` were found of."""
        return self.method.formula(self.parameters, self.models, facts)


def bind(arithmetic: Arithmetic) -> BoundMethod:
    """Find the method and check the parameters that a task was made with."""
    models = canonical_json([model.parameters for model in arithmetic.models])
    return _bind(arithmetic.method, canonical_json(arithmetic.parameters), models)


def whole_of(arithmetic: Arithmetic) -> Whole | None:
    """How a whole tensor is merged, where no formula does it; asks methods that always have one nothing."""
    return bind(arithmetic).whole if get_method(arithmetic.method).whole else None


@lru_cache(maxsize=256)
def _bind(name: str, parameters_json: str, models_json: str) -> BoundMethod:
    method = get_method(name)
    parameters = method.parameters.model_validate_json(parameters_json)
    models = tuple(method.model_parameters.model_validate(value) for value in json.loads(models_json))
    whole = None if method.whole is None else method.whole(parameters, models)
    passes = () if whole else method.survey(parameters, models)
    return BoundMethod(method, parameters, models, passes, whole)
