"""``/v1/plans``: plan and price a merge without running it."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api.deps import SettingsDep, StoreDep, plan_options
from api.schemas import PlanRequest
from service.plan import plan_summary
from service.planning import plan_recipe
from service.recipe import parse_recipe
from workers.errors import PlanError, StoreError
from workers.store.uris import normalise

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post("")
def plan(body: PlanRequest, settings: SettingsDep, store: StoreDep) -> dict[str, Any]:
    """Open the models' headers, check everything, and return the price, the files and the notices."""
    options = plan_options(settings, body.options)
    recipe = parse_recipe(body.recipe)
    try:
        output = None if body.output is None else normalise(body.output)
    except StoreError as error:
        raise PlanError(f"output: {error}") from error
    planned = plan_recipe(
        recipe, options, store, settings.model_roots, settings.worker_baseline_bytes, output
    )
    return plan_summary(planned.plan)
