"""What the command line can do without any server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.bodies import check
from api.looking import plan_wanted
from api.routes.methods import list_methods
from api.schemas import OptionsBody
from service.planning.plan import plan_summary
from service.settings import Settings
from workers.store import open_stores


def plan_here(
    recipe: Mapping[str, Any], output: str | None, options: Mapping[str, Any], settings: Settings
) -> dict[str, Any]:
    """What ``POST /v1/plans`` would tell.

    :raises RecipeError: the merge would fail; lists every problem.
    """
    wanted = check(lambda: dict(recipe), output, OptionsBody(**options), settings)
    planned = plan_wanted(wanted, settings, open_stores(settings.store))
    return plan_summary(planned.plan, settings.gpu_memory_bytes)


def methods_here() -> list[dict[str, Any]]:
    """What ``GET /v1/methods`` would tell."""
    return [method.model_dump(mode="json") for method in list_methods()]
