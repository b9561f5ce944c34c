"""``/v1/plans``: plan and price a merge without running it."""

from __future__ import annotations

from anyio.to_thread import run_sync
from fastapi import APIRouter

from api.auth import CallerDep
from api.bodies import Body, BodyDep, read
from api.deps import PlanLimiterDep, SettingsDep, StoreDep
from api.looking import granted, plan_wanted
from api.openapi import problems, recipe_body
from api.schemas import PlanInfo, PlanRequest
from service.keys import ApiKey
from service.planning.plan import plan_summary
from service.settings import Settings
from workers.store.base import ObjectStore

router = APIRouter(prefix="/v1/plans", tags=["plans"])


@router.post(
    "",
    response_model=PlanInfo,
    openapi_extra=recipe_body(PlanRequest),
    responses=problems(400, 408, 413, 415, 422, 502),
)
async def plan(
    caller: CallerDep, body: BodyDep, settings: SettingsDep, store: StoreDep, limiter: PlanLimiterDep
) -> PlanInfo:
    """Open the models' headers, check everything, and return the price, the files and the notices."""
    return await run_sync(_plan, caller, body, settings, store, limiter=limiter)


def _plan(caller: ApiKey, body: Body, settings: Settings, store: ObjectStore) -> PlanInfo:
    wanted = read(body, settings, PlanRequest)
    planned = plan_wanted(wanted, settings, store, granted(caller, wanted, settings))
    return PlanInfo.model_validate(plan_summary(planned.plan, settings.gpu_memory_bytes))
