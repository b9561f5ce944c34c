"""``/v1/methods``: what can be merged with."""

from __future__ import annotations

from fastapi import APIRouter

from api.routing import readable
from api.schemas import MethodInfo
from service.planning.price import WORKSPACE_BYTES, WORKSPACE_BYTES_PER_INPUT
from workers.methods import METHODS
from workers.methods.base import Method

router = APIRouter(prefix="/v1/methods", tags=["methods"])


@readable(router, "", response_model=list[MethodInfo])
def list_methods() -> list[MethodInfo]:
    """Every merge method with the JSON schemas of its parameters."""
    return [_info(method) for method in METHODS.values()]


def _info(method: Method) -> MethodInfo:
    passes, whole = method.typical_cost
    return MethodInfo(
        name=method.name,
        summary=method.summary,
        paper=method.paper,
        formula=method.reads_as,
        base=method.base,
        min_models=method.min_models,
        max_models=method.max_models,
        parameters=method.parameters.model_json_schema(by_alias=True),
        model_parameters=method.model_parameters.model_json_schema(by_alias=True),
        profiles={name: dict(values) for name, values in method.profiles.items()},
        most_reads=1 + passes,
        whole_bytes_per_element=whole,
        workspace_bytes=WORKSPACE_BYTES,
        workspace_bytes_per_input=WORKSPACE_BYTES_PER_INPUT,
        statistic=None if method.statistic is None else method.statistic.name,
    )
