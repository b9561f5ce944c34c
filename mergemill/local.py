"""What the command line can do without any server."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.deps import plan_options
from api.routes.methods import list_methods
from api.schemas import OptionsBody
from service.plan import plan_summary
from service.planning import overlap, plan_recipe
from service.recipe import parse_recipe
from service.settings import Settings
from workers.errors import PlanError, StoreError
from workers.store import open_stores
from workers.store.uris import normalise


def plan_here(
    recipe: Mapping[str, Any], output: str | None, options: Mapping[str, Any], settings: Settings
) -> dict[str, Any]:
    """What ``POST /v1/plans`` would tell.

    :raises RecipeError: the merge would fail; lists every problem.
    """
    wanted = plan_options(settings, OptionsBody(**options))
    store = open_stores(settings.store)
    planned = plan_recipe(
        parse_recipe(dict(recipe)), wanted, store, settings.model_roots, settings.worker_baseline_bytes
    )
    if output is not None:
        try:
            problems = overlap(normalise(output), planned.uris.values())
        except StoreError as error:
            problems = [f"output: {error}"]
        if problems:
            raise PlanError(*problems)
    return plan_summary(planned.plan)


def methods_here() -> list[dict[str, Any]]:
    """What ``GET /v1/methods`` would tell."""
    return [method.model_dump(mode="json") for method in list_methods()]
